"""Options of the questions, and of where their passages come from."""

from roserag_jax.options.option import Faults, Option, together
from roserag_jax.rag.corpora import CHUNK_TITLES
from roserag_jax.rag.layouts import READERS
from roserag_jax.retrieval.registry import RETRIEVERS

DATA = {
    "train": Option(
        "synthetic",
        "training questions: a .json or .jsonl file, plain or .gz, "
        "hf://owner/name[@revision][/configuration][:split], or 'synthetic'",
    ),
    "eval": Option("synthetic", "held-out questions, named in the same way"),
    "format": Option("auto", "layout of both files; auto detects it from the first row", ("auto", *READERS)),
    "language": Option("", "language of the questions, for evaluate.metric: 'de', 'zh' (MLQA) or 'zh_cn' (MKQA), ..."),
    "pairs": Option("", "ready-made pairs, TRL's {prompt, chosen, rejected}, to train on instead of generated ones"),
    "train_rows": Option(0, "number of training rows to use, from the first; 0 is all (synthetic: 200)", at_least=0),
    "eval_rows": Option(0, "number of held-out rows to use, from the first; 0 is all (synthetic: 100)", at_least=0),
    "synthetic_seed": Option(0, "seed of the synthetic world and its questions", at_least=0),
    "synthetic_passages": Option(5, "number of passages of a synthetic question", at_least=2),
    "synthetic_missing_gold": Option(
        0.0, "fraction of the synthetic questions that lack a gold passage", at_least=0, at_most=1
    ),
    "synthetic_counterfactual": Option(
        0.0, "fraction of the synthetic questions that have a passage with a wrong answer", at_least=0, at_most=1
    ),
}

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
        "a folder of documents (text, Markdown; HTML, PDF and .docx with the extra 'documents'); used by bm25, answer, "
        "noise and StrategyQA's evidence",
    ),
    "chunk_words": Option(120, "length of a passage of a document in words, about", at_least=10),
    "chunk_overlap": Option(0, "number of words that a passage of a document repeats from the one before", at_least=0),
    "chunk_title": Option(
        "file", "title of a document's passages: its file's name, that and the heading, or none", CHUNK_TITLES
    ),
    "cache": Option("", "FlashRAG's retrieval_cache.json, or a folder of such files"),
    "server": Option("", "URL of a server with POST /retrieve, such as that of `retrieve --serve`"),
    "k": Option(10, "number of passages that bm25 or the cache returns for a question", at_least=1),
}


@together
def _retriever_has_its_source(config) -> Faults:
    retrieve = config.retrieve
    for name, spec in RETRIEVERS.items():
        for option in spec.needs if name == retrieve.retriever else ():
            if not retrieve[option] and not (option == "corpus" and config.index):
                yield f"retrieve.{option}", f"{name} needs it: {RETRIEVE[option].help}"
        for option in spec.only if name != retrieve.retriever else ():
            if retrieve[option]:
                yield f"retrieve.{option}", f"is read with config.retrieve.retriever={name} only"


@together
def _chunks_move_on(config) -> Faults:
    if config.retrieve.chunk_overlap >= config.retrieve.chunk_words:
        yield "retrieve.chunk_overlap", f"must be less than config.retrieve.chunk_words={config.retrieve.chunk_words}"


@together
def _enough_passages_are_retrieved(config) -> Faults:
    if config.retrieve.retriever == "given":
        return
    if config.retrieve.k < config.prompt.passages:
        yield "retrieve.k", f"is less than config.prompt.passages={config.prompt.passages}"
    if config.retrieve.k < max(config.evaluate.passages, default=0):
        yield "retrieve.k", f"is less than the largest of config.evaluate.passages={config.evaluate.passages}"
