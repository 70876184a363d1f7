"""The retrievers that `config.retrieve.retriever` names. To add one, write its class and add an entry."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from roserag_jax.retrieval.cache import Cache
from roserag_jax.retrieval.indexing import open_index
from roserag_jax.retrieval.server import Server


class Retriever(Protocol):
    """Finds passages for questions."""

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score?}`, best first."""


class RetrieverSpec(NamedTuple):
    """How a retriever is declared.

    Attributes:
      help: what it does, a clause whose subject is its name.
      build: makes it from the configuration.
      needs: the options of `config.retrieve` that name its files.
      only: those of them that nothing else reads.
    """

    help: str
    build: Callable[[Any], Retriever]
    needs: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


RETRIEVERS = {
    "bm25": RetrieverSpec("searches the corpus", open_index, ("corpus",)),
    "cache": RetrieverSpec(
        "looks each question up in a file", lambda config: Cache(config.retrieve.cache), ("cache",), ("cache",)
    ),
    "server": RetrieverSpec(
        "asks a server in Search-R1's protocol", lambda config: Server(config.retrieve.server), ("server",), ("server",)
    ),
}


def found_nothing(found: list[list[dict]]) -> str:
    """A sentence about the questions for which no passage was found; empty if there are none."""
    empty = sum(not contexts for contexts in found)
    if not empty:
        return ""
    return f"Nothing was found for {empty} of {len(found)} questions: no passage shares a word with them."
