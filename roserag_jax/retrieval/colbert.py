"""ColBERTv2 (arXiv 2112.01488): a vector for each word piece of a text, compared by late interaction.

Axes: Q queries, R rows (passages), W word pieces of a text, D model width, Z size of a vector.

A query has always `query_length` vectors: it is filled up with [MASK] pieces, to which nothing attends but whose
outputs count. A passage has a vector for each of its word pieces but punctuation. The score is MaxSim: for each vector
of the query the largest dot product with one of the passage's, summed (equation 1 of arXiv 2004.12832).
"""

import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.errors import UserError, quote
from roserag_jax.hub import encoder
from roserag_jax.hub.json_files import Fields, read_json_object
from roserag_jax.retrieval.batches import BatchEncoder, WordPieces

PADDED = -9999.0  # the similarity of what is no piece of the passage
_SIMILARITIES = {"cpu": 1 << 19}  # computed at once
_SIMILARITIES_ELSEWHERE = 1 << 26


class Settings(NamedTuple):
    """How a checkpoint was trained to read its texts; the defaults are ColBERTv2's.

    Attributes:
      query_marker, passage_marker: tokens behind [CLS] that tell one from the other.
      query_length, passage_length: most word pieces, markers included.
      skips_punctuation: whether a passage's punctuation gets no vectors.
      attends_to_masks: whether a query's pieces attend to the [MASK] pieces that fill it up.
    """

    query_marker: str = "[unused0]"
    passage_marker: str = "[unused1]"
    query_length: int = 32
    passage_length: int = 180
    skips_punctuation: bool = True
    attends_to_masks: bool = False


def read_settings(folder: Path) -> Settings:
    """Read the settings of a checkpoint, by ColBERT's names or PyLate's.

    Raises:
      UserError: one is of another type, or asks for what is not implemented.
    """
    default = Settings()
    if (file := folder / encoder.COLBERT_SETTINGS).is_file():
        fields = Fields(read_json_object(file), str(file))
        if (similarity := fields.text("similarity", "cosine")) != "cosine":
            raise UserError(f"{file}: similarity {quote(similarity)} is not implemented; known: cosine.")
        return Settings(
            fields.text("query_token_id", default.query_marker),
            fields.text("doc_token_id", default.passage_marker),
            fields.integer("query_maxlen", default.query_length, 4, 512),
            fields.integer("doc_maxlen", default.passage_length, 4, 8192),
            fields.flag("mask_punctuation", default.skips_punctuation),
            fields.flag("attend_to_mask_tokens", default.attends_to_masks),
        )
    if (file := folder / encoder.SENTENCE_SETTINGS).is_file():
        fields = Fields(read_json_object(file), str(file))
        if not fields.flag("do_query_expansion", True):
            raise UserError(f"{file}: do_query_expansion=false is not implemented.")
        words = fields.values.get("skiplist_words")
        if words is not None and set(words) not in (set(), set(string.punctuation)):
            raise UserError(f"{file}: skiplist_words other than punctuation are not implemented.")
        return Settings(
            fields.text("query_prefix", default.query_marker),
            fields.text("document_prefix", default.passage_marker),
            fields.integer("query_length", default.query_length, 4, 512),
            fields.integer("document_length", default.passage_length, 4, 8192),
            words is None or bool(words),
            fields.flag("attend_to_expansion_tokens", default.attends_to_masks),
        )
    return default


def normalize(x: Float[Array, "*rows Z"]) -> Float[Array, "*rows Z"]:
    """Scale the last axis to length 1, as torch does (zeros stay zeros)."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _project(
    hidden: Float[Array, "R W D"], tokens: Any, mask: Any, weight: Float[Array, "Z D"]
) -> Float[Array, "R W Z"]:
    return normalize(hidden.astype(jnp.float32) @ weight.T)


class ColBERT:
    """Encodes queries and passages with a ColBERTv2 checkpoint.

    Args:
      folder: the checkpoint; its BERT and projection are read in the layout of ColBERT or of PyLate.
      mesh: batches are split over its devices.

    Raises:
      UserError: the folder is no such checkpoint.
    """

    def __init__(self, folder: Path, mesh: Mesh, dtype=jnp.float32):
        read = encoder.load_encoder(folder, mesh, dtype)
        weight = jnp.asarray(encoder.read_projection(read))
        self.tokenizer, self.settings, self.size = read.tokenizer, read_settings(folder), weight.shape[0]
        self.encoder, self.word_pieces = BatchEncoder(read.bert, mesh, _project, weight), WordPieces(read.tokenizer)
        most = read.bert.config.max_positions
        if self.settings.query_length > most:
            raise UserError(f"{folder}: {self.settings.query_length} word pieces of a query, but {most} positions.")
        self.passage_length = min(self.settings.passage_length, most)
        self.query_marker = self._token(folder, self.settings.query_marker)
        self.passage_marker = self._token(folder, self.settings.passage_marker)
        self.mask_id, self.pad_id = self._token(folder, "[MASK]"), self._token(folder, "[PAD]")
        pieces = lambda sign: self.tokenizer(sign, add_special_tokens=False)["input_ids"][:1]
        skipped = {i for sign in string.punctuation for i in pieces(sign)} if self.settings.skips_punctuation else set()
        self.skipped = np.array(sorted(skipped), np.int32)

    def _token(self, folder: Path, name: str) -> int:
        vocabulary = self.tokenizer.get_vocab()
        for known in (name, name.strip()):
            if known in vocabulary:
                return vocabulary[known]
        raise UserError(f"{folder}: its tokenizer has no token {quote(name)}.")

    def _tokenize(self, texts: Sequence[str], length: int, marker: int) -> list[list[int]]:
        """Word pieces with the marker behind [CLS], at most `length` in all."""
        return [[ids[0], marker, *ids[1:]] for ids in self.word_pieces(texts, length - 1)]

    def encode_queries(self, queries: Sequence[str]) -> Float[np.ndarray, "Q W Z"]:
        """The vectors of queries, `query_length` of each."""
        W, devices = self.settings.query_length, self.encoder.mesh.size
        texts, made = self._tokenize(queries, W, self.query_marker), []
        step = devices * max(1, self.encoder.batch_tokens // (W * devices))
        for start in range(0, len(texts), step):
            batch = texts[start : start + step]
            R = min(step, devices * (1 << (-(-len(batch) // devices) - 1).bit_length()))
            tokens = np.full((R, W), self.mask_id, np.int32)
            mask = np.full((R, W), self.settings.attends_to_masks)
            mask[:, 0] = True
            for row, shown, ids in zip(tokens, mask, batch, strict=False):
                row[: len(ids)], shown[: len(ids)] = ids, True
            made.append(np.asarray(self.encoder(tokens, mask))[: len(batch)])
        return np.concatenate(made) if made else np.zeros((0, W, self.size), np.float32)

    def encode_passages(self, passages: Iterable[dict]) -> list[Float[np.ndarray, "W Z"]]:
        """The vectors of passages `{title, text}`, one for each of their word pieces that is kept."""
        return self.encode_texts([passage_text(passage) for passage in passages])

    def encode_texts(self, texts: Sequence[str]) -> list[Float[np.ndarray, "W Z"]]:
        """The vectors of passages that are written out already."""
        tokenized = self._tokenize(texts, self.passage_length, self.passage_marker)
        vectors: list = [None] * len(tokenized)
        for places, rows in self.encoder.each(tokenized, self.pad_id):
            for row, place in zip(rows, places, strict=False):
                kept = ~np.isin(tokenized[place], self.skipped)
                vectors[place] = row[: len(kept)][kept]
        return vectors


def passage_text(passage: dict) -> str:
    """A passage as ColBERT's corpora write it."""
    return f"{passage['title']} | {passage['text']}" if passage["title"] else passage["text"]


def maxsim(
    queries: Float[Array, "Q W1 Z"], passages: Float[Array, "R W2 Z"], kept: Bool[Array, "R W2"]
) -> Float[Array, "Q R"]:
    """Score every passage for every query by MaxSim.

    A few passages at a time: the similarities of all would not stay in a cache, and take three times as long on a CPU.
    """
    (Q, pieces, Z), W = queries.shape, passages.shape[1]

    def score(passage):
        vectors, kept = passage
        similar = queries.reshape(Q * pieces, Z) @ vectors.astype(jnp.float32).T
        return jnp.where(kept, similar, PADDED).max(axis=-1).reshape(Q, pieces).sum(axis=1)

    at_once = _SIMILARITIES.get(jax.default_backend(), _SIMILARITIES_ELSEWHERE) // (Q * pieces * W)
    return jax.lax.map(score, (passages, kept), batch_size=max(1, at_once)).T


def pad(vectors: Sequence[np.ndarray], length: int | None = None) -> tuple[np.ndarray, Int[np.ndarray, "R"]]:
    """Vectors of several passages in one array [R, W, Z] of zeros behind them, and how many each has."""
    lengths = np.array([len(each) for each in vectors], np.int32)
    padded = np.zeros((len(vectors), length or max(1, lengths.max(initial=1)), vectors[0].shape[1]), vectors[0].dtype)
    for row, each in zip(padded, vectors, strict=True):
        row[: len(each)] = each
    return padded, lengths
