"""The retrievers that `config.retrieve.retriever` names. To add one, write its class and add an entry.

The options derive from the entries, so a retriever's own module, and what that imports, is imported when it is built.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

POOLINGS = ("mean", "cls")  # of a sentence encoder
BITS = (1, 2, 4)  # of a dimension of compressed vectors
# Passages of a question that are ordered, or that each fused retriever finds. Of HotPotQA's gold passages BM25 has 91%
# among the first 30 and 94% among 100, which a CPU encodes for three times as long; fusion finds more at little cost.
RERANKED, FUSED = 30, 100


class Retriever(Protocol):
    """Finds passages for questions."""

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best passages for each query, at most k, as contexts `{title, text, score?}`, best first."""


class RetrieverSpec(NamedTuple):
    """How a retriever is declared.

    Attributes:
      help: what it does, a clause whose subject is its name.
      build: makes it from the configuration.
      needs: the options of `config.retrieve` without which it cannot be made.
      takes: further ones that change what it finds.
    """

    help: str
    build: Callable[[Any], Retriever]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def _colbert(config):
    from roserag_jax.hub.encoder import resolve_encoder
    from roserag_jax.retrieval.batches import local_mesh
    from roserag_jax.retrieval.colbert import ColBERT

    return ColBERT(resolve_encoder(config.retrieve.colbert, "retrieve.colbert"), local_mesh())


def _dense_settings(options, folder: Path):
    from roserag_jax.retrieval import dense

    return dense.read_settings(folder, options.pooling, options.query_prefix, options.passage_prefix)


def _sentence_encoder(config):
    from roserag_jax.hub.encoder import resolve_encoder
    from roserag_jax.retrieval.batches import local_mesh
    from roserag_jax.retrieval.dense import SentenceEncoder

    folder = resolve_encoder(config.retrieve.dense, "retrieve.dense")
    return SentenceEncoder(folder, local_mesh(), _dense_settings(config.retrieve, folder))


_ENCODERS = {"colbert": _colbert, "dense": _sentence_encoder}


def _by_vectors(name: str) -> Callable[[Any], Retriever]:
    """A function that builds the retriever by the vectors of an encoder, which it brings up to date."""

    def build(config) -> Retriever:
        from roserag_jax.retrieval.batches import local_mesh
        from roserag_jax.retrieval.vectors import VectorRetriever, VectorStore

        index, encoder = _bm25(config), _ENCODERS[name](config)
        folder = update_vectors(config, name, index, lambda: encoder)
        store = VectorStore(folder, index.passages.numbers, local_mesh())
        return VectorRetriever(index, encoder, store, config.retrieve.probe)

    return build


def update_vectors(config, name: str, index, encoder: Callable | None = None, together: bool = False) -> Path:
    """Bring the vectors of an index by one encoder up to date; returns their folder, inside that of the index.

    Args:
      encoder: makes the encoder; by default that of the configuration.
      together: whether all processes of the run call this and share the work; otherwise this one does it alone.
    """
    import jax

    from roserag_jax.hub.encoder import encoder_fingerprint, resolve_encoder
    from roserag_jax.retrieval import vector_indexing

    options, normalized = config.retrieve, True
    fingerprint = encoder_fingerprint(options[name], f"retrieve.{name}")
    if name == "dense":
        settings = _dense_settings(options, resolve_encoder(options.dense, "retrieve.dense", weights=False))
        fingerprint, normalized = f"{fingerprint} {settings.for_passages()}", settings.normalized
    folder = index.folder / vector_indexing.folder_name(name, fingerprint, options.bits)
    vector_indexing.update(
        folder,
        index,
        encoder or (lambda: _ENCODERS[name](config)),
        fingerprint=fingerprint,
        bits=options.bits,
        normalized=normalized,
        share=(jax.process_index(), jax.process_count()) if together else (0, 1),
        verify=together,
    )
    return folder


def _bm25(config):
    from roserag_jax.retrieval.indexing import open_index

    return open_index(config)


def _reranker(config) -> Retriever:
    from roserag_jax.retrieval.combined import Reranker

    return Reranker(_bm25(config), _colbert(config), config.retrieve.candidates or RERANKED)


def _fusion(config) -> Retriever:
    from roserag_jax.retrieval.combined import Fusion

    fused = [RETRIEVERS[name].build(config) for name in config.retrieve.fused]
    return Fusion(fused, config.retrieve.candidates or FUSED)


def _cache(config) -> Retriever:
    from roserag_jax.retrieval.cache import Cache

    return Cache(config.retrieve.cache)


def _server(config) -> Retriever:
    from roserag_jax.retrieval.server import Server

    return Server(config.retrieve.server)


def _opensearch(config) -> Retriever:
    from roserag_jax.retrieval.opensearch import OpenSearch

    return OpenSearch(config.retrieve.opensearch)


_VECTORS = ("bits", "probe")
RETRIEVERS = {
    "bm25": RetrieverSpec("searches the corpus by words", _bm25, ("corpus",)),
    "colbert": RetrieverSpec(
        "searches it by ColBERTv2's late interaction", _by_vectors("colbert"), ("corpus", "colbert"), _VECTORS
    ),
    "rerank": RetrieverSpec(
        "orders what bm25 finds by ColBERTv2's score", _reranker, ("corpus", "colbert"), ("candidates",)
    ),
    "dense": RetrieverSpec(
        "searches the corpus by a sentence encoder's vectors",
        _by_vectors("dense"),
        ("corpus", "dense"),
        (*_VECTORS, "pooling", "query_prefix", "passage_prefix"),
    ),
    "hybrid": RetrieverSpec(
        "fuses what the retrievers of retrieve.fused find by reciprocal rank", _fusion, ("fused",), ("candidates",)
    ),
    "cache": RetrieverSpec("looks each question up in a file", _cache, ("cache",)),
    "server": RetrieverSpec("asks a server in Search-R1's protocol", _server, ("server",)),
    "opensearch": RetrieverSpec(
        "asks an index of OpenSearch or Elasticsearch",
        _opensearch,
        ("opensearch",),
    ),
}
FUSABLE = tuple(name for name in RETRIEVERS if name != "hybrid")
ENCODERS = ("colbert", "dense")  # the options that name one


def members(retrieve) -> list[RetrieverSpec]:
    """The retrievers that a configuration's section reads from: the one named, and those it fuses."""
    name = retrieve.retriever
    names = [] if name == "given" else [name, *(retrieve.fused if name == "hybrid" else ())]
    return [RETRIEVERS[each] for each in names]


def vectors_of(retrieve) -> list[str]:
    """The encoders whose vectors of the passages a configuration's section searches."""
    names = [retrieve.retriever, *(retrieve.fused if retrieve.retriever == "hybrid" else ())]
    return [name for name in names if name in _ENCODERS]


def users(option: str) -> str:
    """The retrievers that read an option, for messages and help."""
    return ", ".join(name for name, spec in RETRIEVERS.items() if option in spec.needs + spec.takes)


def open_retriever(config) -> Retriever:
    """Open the retriever for questions that no file has passages of: the one named, or BM25 where that is a file."""
    return RETRIEVERS[_for_new_questions(config.retrieve)].build(config)


def _for_new_questions(retrieve) -> str:
    return "bm25" if retrieve.retriever in ("given", "cache") else retrieve.retriever


def searches_corpus(retrieve) -> bool:
    """Whether `open_retriever` needs a corpus or its index."""
    return "corpus" in RETRIEVERS[_for_new_questions(retrieve)].needs


def found_nothing(empty: int, questions: int) -> str:
    """A sentence about the questions for which no passage was found; empty if there are none."""
    return f"Nothing was found for {empty} of {questions} questions: no passage shares a word with them." * bool(empty)
