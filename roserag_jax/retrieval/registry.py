"""The retrievers that `config.retrieve.retriever` names. To add one, write its class and add an entry."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from roserag_jax.rag.corpora import read_corpus
from roserag_jax.retrieval.bm25 import BM25
from roserag_jax.retrieval.cache import Cache


class Retriever(Protocol):
    """Finds passages for questions."""

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score?}`, best first."""


class RetrieverSpec(NamedTuple):
    """How a retriever is declared.

    Attributes:
      help: what it does, a clause whose subject is its name.
      build: makes it from `config.retrieve`.
      needs: the options of `config.retrieve` that name its files.
      only: those of them that nothing else reads.
    """

    help: str
    build: Callable[[Any], Retriever]
    needs: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


RETRIEVERS = {
    "bm25": RetrieverSpec("searches the corpus", lambda options: BM25(read_corpus(options.corpus)), ("corpus",)),
    "cache": RetrieverSpec(
        "looks each question up in a file", lambda options: Cache(options.cache), ("cache",), ("cache",)
    ),
}


def found_nothing(found: list[list[dict]]) -> str:
    """A sentence about the questions for which no passage was found; empty if there are none."""
    empty = sum(not contexts for contexts in found)
    if not empty:
        return ""
    return f"Nothing was found for {empty} of {len(found)} questions: no passage shares a word with them."
