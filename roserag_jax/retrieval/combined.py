"""Retrievers made of others: the order of one refined by ColBERT, and several fused by rank."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from roserag_jax.retrieval.batches import LENGTHS
from roserag_jax.retrieval.colbert import ColBERT, maxsim, pad

_QUERIES = 32  # whose passages are encoded together
_KEPT_BYTES = 1 << 29  # of vectors, 13,000 passages of 80 word pieces
_RANK = 60  # of reciprocal-rank fusion: how little the first ranks stand out


def _key(context: dict) -> tuple[str, str]:
    return context["title"], context["text"]


class Reranker:
    """Orders what another retriever finds by ColBERT's score; no vectors of the corpus are kept on disk.

    Those of the passages that were used last are kept in memory, for questions of one topic find the same ones.

    Args:
      candidates: passages of a question that are scored.
    """

    def __init__(self, first: Any, colbert: ColBERT, candidates: int):
        self.first, self.colbert, self.candidates = first, colbert, candidates
        self._vectors: dict[tuple[str, str], np.ndarray] = {}  # in the order of their last use
        self._lock = threading.Lock()  # a server's threads search at once

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts with ColBERT's score, best first."""
        found = []
        for start in range(0, len(queries), _QUERIES):
            found += self._search(queries[start : start + _QUERIES], k)
        return found

    def _search(self, queries: list[str], k: int) -> list[list[dict]]:
        candidates = self.first.search(queries, max(k, self.candidates))
        vectors = self._encode({_key(c): c for contexts in candidates for c in contexts})
        asked, found = self.colbert.encode_queries(queries), []
        for query, contexts in zip(asked, candidates, strict=True):
            scores = _scores(query, [vectors[_key(c)] for c in contexts])
            order = np.argsort(-scores, kind="stable")[:k]
            found.append([contexts[i] | {"score": float(scores[i])} for i in order])
        return found

    def _encode(self, passages: dict[tuple[str, str], dict]) -> dict[tuple[str, str], np.ndarray]:
        """The vectors of passages by key; those that are known are not encoded again."""
        with self._lock:
            known = {key: self._vectors.pop(key) for key in passages if key in self._vectors}
        new = {key: passage for key, passage in passages.items() if key not in known}
        known |= zip(new, self.colbert.encode_passages(new.values()), strict=True)
        with self._lock:
            self._vectors |= known
            over = sum(vectors.nbytes for vectors in self._vectors.values()) - _KEPT_BYTES
            while over > 0:
                over -= self._vectors.pop(next(iter(self._vectors))).nbytes
        return known


_maxsim = jax.jit(maxsim)


def _scores(query: np.ndarray, passages: Sequence[np.ndarray]) -> np.ndarray:
    """MaxSim of one query with some passages."""
    if not passages:
        return np.zeros(0, np.float32)
    longest = max(map(len, passages))
    padded, lengths = pad(passages, next((size for size in LENGTHS if size >= longest), longest))
    R = 1 << (len(passages) - 1).bit_length()
    padded = np.pad(padded, ((0, R - len(passages)), (0, 0), (0, 0)))
    kept = np.arange(padded.shape[1]) < np.pad(lengths, (0, R - len(lengths)))[:, None]
    return np.asarray(_maxsim(query[None], padded, kept))[0, : len(passages)]


class Fusion:
    """Fuses what several retrievers find by reciprocal rank: a passage scores the sum of 1 / (60 + its rank).

    From Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet", SIGIR 2009.

    Args:
      candidates: passages of a question that each of them finds.
    """

    def __init__(self, retrievers: Sequence[Any], candidates: int):
        self.retrievers, self.candidates = retrievers, candidates

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, best first; equal ones in the first retriever's order."""
        each = [retriever.search(queries, max(k, self.candidates)) for retriever in self.retrievers]
        return [self._fused(rankings)[:k] for rankings in zip(*each, strict=True)]

    def _fused(self, rankings: Sequence[list[dict]]) -> list[dict]:
        passages, scores = {}, {}
        for ranking in rankings:
            for rank, key in enumerate(dict.fromkeys(map(_key, ranking)), 1):  # each passage once
                scores[key] = scores.get(key, 0.0) + 1 / (_RANK + rank)
            passages = {_key(context): context for context in ranking} | passages
        return [passages[key] | {"score": scores[key]} for key in sorted(scores, key=lambda key: -scores[key])]
