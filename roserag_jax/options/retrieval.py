"""Options of retrieval: where passages come from, and what finds them."""

from roserag_jax.options.option import Faults, Option, together, together_in_runs
from roserag_jax.rag.corpora import CHUNK_TITLES
from roserag_jax.retrieval import registry
from roserag_jax.retrieval.registry import RETRIEVERS


def _fused(value) -> str | None:
    good = not set(value) - set(registry.FUSABLE) and len(set(value)) == len(value) != 1
    return None if good else f"a tuple of two or more of {', '.join(registry.FUSABLE)}, such as ('bm25', 'dense')"


RETRIEVE = {
    "retriever": Option(
        "given",
        "where passages come from: 'given' keeps those of the questions' rows, "
        + ", ".join(f"'{name}' {spec.help}" for name, spec in RETRIEVERS.items()),
        ("given", *RETRIEVERS),
    ),
    "corpus": Option(
        "",
        "corpus to search: rows of {id, contents} or {id, title, text} (a file or hf://), StrategyQA's paragraphs, or "
        "a folder of documents (text, Markdown; HTML, PDF and .docx with the extra 'documents'); used by the "
        "retrievers that search it, answer, noise and StrategyQA's evidence",
    ),
    "chunk_size": Option(120, "length of a passage of a document in words (or tokens), about", at_least=10),
    "chunk_overlap": Option(
        0, "number of words (or tokens) that a passage of a document repeats from the one before", at_least=0
    ),
    "chunk_unit": Option(
        "words",
        "what these two count: words, or tokens of the retriever's encoder, else of the model",
        ("words", "tokens"),
    ),
    "chunk_title": Option(
        "file", "title of a document's passages: its file's name, that and the heading, or none", CHUNK_TITLES
    ),
    "cache": Option("", "FlashRAG's retrieval_cache.json, or a folder of such files"),
    "server": Option("", "URL of a server with POST /retrieve, such as that of `retrieve --serve`"),
    "opensearch": Option(
        "",
        "URL of an index of OpenSearch or Elasticsearch, http://HOST:9200/INDEX, with documents of {title, text} or "
        "{contents}; user and password are in OPENSEARCH_USER and OPENSEARCH_PASSWORD; needs the extra 'opensearch'",
    ),
    "colbert": Option(
        "",
        "ColBERTv2 checkpoint with safetensors weights, a Hub id or a folder, in ColBERT's layout or PyLate's; for "
        + registry.users("colbert"),
    ),
    "dense": Option(
        "",
        "sentence encoder of the BERT family with safetensors weights, a Hub id or a folder; for "
        + registry.users("dense"),
    ),
    "pooling": Option(
        "auto",
        "how the sentence encoder's hidden states become one vector: their mean, or the first (cls); auto is what its "
        "files say, else the mean",
        ("auto", *registry.POOLINGS),
    ),
    "query_prefix": Option(
        "auto",
        "text put before a question for the sentence encoder ('query: ' for E5); auto is what its files say, else none",
    ),
    "passage_prefix": Option("auto", "text put before a passage ('passage: ' for E5), likewise"),
    "bits": Option(
        0,
        "bits of a dimension that vectors are compressed to, beside a centroid; 0 keeps them in float16; for "
        + registry.users("bits"),
        (0, *registry.BITS),
    ),
    "probe": Option(
        0,
        "compare only passages near this many centroids of each vector of the question, for large corpora; needs "
        "retrieve.bits; 0 compares all",
        at_least=0,
    ),
    "candidates": Option(
        0,
        "number of passages of a question that bm25 hands on to be ordered, or that each fused retriever finds; 0 is "
        f"{registry.RERANKED} for rerank and {registry.FUSED} for hybrid",
        at_least=0,
    ),
    "fused": Option((), "retrievers that 'hybrid' fuses, two or more", check=_fused),
    "k": Option(10, "number of passages that a retriever returns for a question", at_least=1),
}


@together
def _retriever_has_its_source(config) -> Faults:
    retrieve = config.retrieve
    chosen = registry.members(retrieve)
    for option in dict.fromkeys(option for spec in chosen for option in spec.needs):
        if not retrieve[option] and not (option == "corpus" and config.index):
            yield f"retrieve.{option}", f"{retrieve.retriever} needs it: {RETRIEVE[option].help}"
    read = {"corpus", *(option for spec in chosen for option in spec.needs + spec.takes)}
    for option in dict.fromkeys(option for spec in RETRIEVERS.values() for option in spec.needs + spec.takes):
        if option not in read and retrieve[option] != RETRIEVE[option].default:
            yield f"retrieve.{option}", f"is read with config.retrieve.retriever={registry.users(option)} only"


@together
def _only_compressed_vectors_have_centroids(config) -> Faults:
    if config.retrieve.probe and not config.retrieve.bits:
        yield "retrieve.probe", f"needs compressed vectors; set config.retrieve.bits to one of {registry.BITS}"


@together
def _chunks_move_on(config) -> Faults:
    retrieve = config.retrieve
    if retrieve.chunk_overlap >= retrieve.chunk_size:
        yield "retrieve.chunk_overlap", f"must be less than config.retrieve.chunk_size={retrieve.chunk_size}"
    if retrieve.chunk_unit == "tokens" and not (retrieve.colbert or retrieve.dense or config.tokenizer or config.model):
        yield "retrieve.chunk_unit", "needs a tokenizer: set config.tokenizer, config.model or a retriever's encoder"


@together_in_runs
def _enough_passages_are_retrieved(config) -> Faults:
    if config.retrieve.retriever == "given":
        return
    if config.retrieve.k < config.prompt.passages:
        yield "retrieve.k", f"is less than config.prompt.passages={config.prompt.passages}"
    if config.retrieve.k < max(config.evaluate.passages, default=0):
        yield "retrieve.k", f"is less than the largest of config.evaluate.passages={config.evaluate.passages}"
