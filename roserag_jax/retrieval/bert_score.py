"""BERTScore (arXiv 1904.09675): how well the word pieces of two texts match, by the vectors of an encoder.

Axes: R rows (texts), W word pieces of a text, D model width.

Precision is the mean over an answer's word pieces of the best cosine with any of a golden answer's, recall the same the
other way round; the score is their harmonic mean. It is ColBERT's MaxSim in both directions. As in the authors' package
the marks at a text's ends may be matched and have no weight. The vectors are those of the last layer and nothing is
rescaled, so scores are compared with those of the same encoder only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.hub import encoder
from roserag_jax.retrieval.batches import BatchEncoder
from roserag_jax.retrieval.colbert import normalize

_TEXTS_AT_ONCE = 256  # whose vectors are in memory


class PieceVectors(NamedTuple):
    """The unit vectors of a text's word pieces, and which of these count: all but the marks at its ends."""

    vectors: Float[np.ndarray, "W D"]
    counts: Bool[np.ndarray, "W"]


class BertScore:
    """Scores answers against golden ones.

    Args:
      folder: of an encoder of the BERT family.
      mesh: batches are split over its devices.

    Attributes:
      cut: texts so far that were longer than the encoder reads, and were cut.

    Raises:
      UserError: the folder is no such encoder.
    """

    def __init__(self, folder: Path, mesh: Mesh):
        read = encoder.load_encoder(folder, mesh)
        self.tokenizer, self.length, self.cut = read.tokenizer, read.bert.config.max_positions, 0
        self._encoder = BatchEncoder(read.bert, mesh, _unit_vectors)

    def __call__(self, predictions: Sequence[str], golden: Sequence[list[str]]) -> list[float]:
        """The score of each prediction, the best over its golden answers; 0 where one of both has no word piece."""
        scores, rows = [], [[said, *answers] for said, answers in zip(predictions, golden, strict=True)]
        while rows:
            taken = 1
            while taken < len(rows) and sum(map(len, rows[: taken + 1])) <= _TEXTS_AT_ONCE:
                taken += 1
            vectors = self._vectors([*dict.fromkeys(text for row in rows[:taken] for text in row)])
            for said, *answers in rows[:taken]:
                scores.append(max(_f_measure(vectors[said], vectors[answer]) for answer in answers))
            rows = rows[taken:]
        return scores

    def _vectors(self, texts: list[str]) -> dict[str, PieceVectors]:
        stripped = [text.strip() for text in texts]
        self.cut += sum(len(ids) > self.length for ids in self.tokenizer(stripped)["input_ids"])
        read = self.tokenizer(stripped, truncation=True, max_length=self.length, return_special_tokens_mask=True)
        ids, marks, found = read["input_ids"], read["special_tokens_mask"], {}
        for places, hidden in self._encoder.each(ids, self.tokenizer.pad_token_id or 0):
            for place, row in zip(places, hidden, strict=False):
                found[texts[place]] = PieceVectors(row[: len(ids[place])], ~np.array(marks[place], bool))
        return found


def _unit_vectors(
    hidden: Float[Array, "R W D"], tokens: Int[Array, "R W"], mask: Bool[Array, "R W"], _
) -> Float[Array, "R W D"]:
    return normalize(hidden.astype("float32"))


def _f_measure(said: PieceVectors, golden: PieceVectors) -> float:
    """The harmonic mean of the precision and the recall of two texts."""
    if not (said.counts.any() and golden.counts.any()):
        return 0.0
    cosines = said.vectors @ golden.vectors.T
    precision = cosines.max(axis=1)[said.counts].mean()
    recall = cosines.max(axis=0)[golden.counts].mean()
    return float(2 * precision * recall / (precision + recall))
