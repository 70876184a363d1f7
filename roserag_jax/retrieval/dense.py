"""Dense retrieval: one vector for each text, from a sentence encoder of the BERT family.

Axes: Q queries, R rows (passages), W word pieces of a text, D model width.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.errors import UserError, quote
from roserag_jax.hub import encoder
from roserag_jax.hub.json_files import Fields, read_json_object
from roserag_jax.rag.files import read_json
from roserag_jax.retrieval.batches import BatchEncoder, WordPieces
from roserag_jax.retrieval.colbert import normalize


class Settings(NamedTuple):
    """How a sentence encoder was trained to read its texts.

    Attributes:
      pooling: 'mean' of a text's hidden states, or the first one's ('cls').
      normalized: whether vectors are scaled to length 1, so that their dot product is the cosine.
      query_prefix, passage_prefix: text put before each ('query: ' and 'passage: ' in E5).
      length: most word pieces.
    """

    pooling: str = "mean"
    normalized: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    length: int = 512

    def for_passages(self) -> tuple:
        """What changes the vectors of passages."""
        return tuple(self._replace(query_prefix=""))


def read_settings(
    folder: Path, pooling: str = "auto", query_prefix: str = "auto", passage_prefix: str = "auto"
) -> Settings:
    """Read the settings of a sentence-transformers folder; what is not 'auto' stands as it is given.

    Raises:
      UserError: a file asks for what is not implemented.
    """
    found = Settings()._asdict()
    if (file := folder / encoder.MODULES).is_file():
        modules = read_json(file)
        good = isinstance(modules, list) and all(
            isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules
        )
        kinds = [module["type"].rpartition(".")[2] for module in modules] if good else ["?"]
        if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
            raise UserError(f"{file}: module {quote(unknown[0])} is not implemented; known: Pooling, Normalize.")
        found["normalized"] = "Normalize" in kinds or _similarity(folder) != "dot"
    if (file := folder / encoder.POOLING).is_file():
        fields = Fields(read_json_object(file), str(file))
        known = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
        chosen = [name for name, value in fields.values.items() if name.startswith("pooling_mode_") and value is True]
        read = [name for name, field in known.items() if chosen == [field]]
        if not read and pooling == "auto":
            raise UserError(
                f"{file}: pooling by {', '.join(chosen) or 'nothing'} is not implemented; known: mean, cls."
            )
        found["pooling"] = read[0] if read else pooling
    if (file := folder / "sentence_bert_config.json").is_file():
        found["length"] = Fields(read_json_object(file), str(file)).integer("max_seq_length", 512, 8)
    if (file := folder / encoder.SENTENCE_SETTINGS).is_file():
        prompts = read_json_object(file).get("prompts")
        prompts = prompts if isinstance(prompts, dict) else {}
        for field, names in (("query_prefix", ("query",)), ("passage_prefix", ("passage", "document"))):
            found[field] = next((prompts[n] for n in names if isinstance(prompts.get(n), str)), "")
    given = {"pooling": pooling, "query_prefix": query_prefix, "passage_prefix": passage_prefix}
    return Settings(**found | {name: value for name, value in given.items() if value != "auto"})


def _similarity(folder: Path) -> str:
    file = folder / encoder.SENTENCE_SETTINGS
    return (
        Fields(read_json_object(file), str(file)).text("similarity_fn_name", "cosine") if file.is_file() else "cosine"
    )


class SentenceEncoder:
    """Encodes queries and passages with a sentence encoder.

    Args:
      folder: of Hugging Face or sentence-transformers.
      mesh: batches are split over its devices.

    Raises:
      UserError: the folder is no such encoder.
    """

    def __init__(self, folder: Path, mesh: Mesh, settings: Settings, dtype=jnp.float32):
        read = encoder.load_encoder(folder, mesh, dtype)
        self.word_pieces, self.settings, self.size = WordPieces(read.tokenizer), settings, read.bert.config.embed_dim
        self.length = min(settings.length, read.bert.config.max_positions)
        self.pad_id = read.tokenizer.pad_token_id or 0
        self.encoder = BatchEncoder(read.bert, mesh, self._pool)

    def _pool(
        self, hidden: Float[Array, "R W D"], tokens: Int[Array, "R W"], mask: Bool[Array, "R W"], _
    ) -> Float[Array, "R D"]:
        hidden = hidden.astype(jnp.float32)
        if self.settings.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask[..., None].astype(jnp.float32)
            pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        return normalize(pooled) if self.settings.normalized else pooled

    def _encode(self, texts: Sequence[str]) -> Float[np.ndarray, "R D"]:
        made = np.zeros((len(texts), self.size), np.float32)
        if not texts:
            return made
        tokenized = self.word_pieces(texts, self.length)
        for places, rows in self.encoder.each(tokenized, self.pad_id):
            made[places] = rows[: len(places)]
        return made

    def encode_queries(self, queries: Sequence[str]) -> Float[np.ndarray, "Q 1 D"]:
        """The vectors of queries, one of each."""
        return self._encode([self.settings.query_prefix + query for query in queries])[:, None]

    def encode_passages(self, passages: Iterable[dict]) -> list[Float[np.ndarray, "1 D"]]:
        """The vectors of passages `{title, text}`, one of each."""
        prefix = self.settings.passage_prefix
        texts = [f"{prefix}{p['title']}\n{p['text']}" if p["title"] else prefix + p["text"] for p in passages]
        return list(self._encode(texts)[:, None])
