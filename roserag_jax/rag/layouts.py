"""Readers: the layouts in which public data sets come, each row of theirs turned into one of ours.

Ours is `{id, question, golden_answers, contexts: [{title, text, is_supporting?}], metadata}`. A layout is known by the
keys of its first row. To add one: a function of a row, and a line in `READERS`.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from roserag_jax.errors import UserError


class Skip(Exception):
    """A row that cannot be used; the message is the reason, under which such rows are counted."""


class Reader(NamedTuple):
    """The keys that tell a layout, and the function `(row, paragraphs by id)` that turns its row into ours."""

    keys: tuple[str, ...]
    read: Callable[[dict, dict], dict]


def _passages(context: Any, facts: Any) -> list[dict]:
    """Contexts from titles and sentences, in the releases' layout (pairs) or the Hub's and FlashRAG's (two lists)."""
    if isinstance(context, dict):
        sentences = context["sentences"] if "sentences" in context else context["content"]
        context = list(zip(context["title"], sentences, strict=True))
    # HotPotQA's sentences bring their own spaces, 2WikiMultiHopQA's do not.
    edges = [a[-1:] + b[:1] for _, sentences in context for a, b in itertools.pairwise(sentences)]
    between = "" if any(" " in edge for edge in edges) else " "
    passages = [{"title": title, "text": between.join(sentences)} for title, sentences in context]
    if facts is None:  # the test sets' secret
        return passages
    gold = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
    return [{**passage, "is_supporting": passage["title"] in gold} for passage in passages]


def _golden(*answers: Any) -> list[str]:
    """A release's answers as text, yes or no for a truth value; those that are withheld are left out."""
    texts = ["yes" if a is True else "no" if a is False else str(a) for a in answers if a is not None]
    return [text for text in texts if text.strip()]


def _kept(row: dict, *names: str) -> dict:
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def _unified(row: dict, _) -> dict:
    """Our rows and FlashRAG's, whose HotPotQA and 2WikiMultiHopQA carry their paragraphs in `metadata`."""
    metadata, golden = row.get("metadata"), row.get("golden_answers")
    if isinstance(golden, list):
        row = {**row, "golden_answers": _golden(*golden)}
    if not row.get("contexts") and isinstance(metadata, dict) and metadata.get("context"):
        rest = {k: v for k, v in metadata.items() if k != "context"}
        contexts = _passages(metadata["context"], metadata.get("supporting_facts"))
        return {**row, "contexts": contexts, "metadata": rest}
    return row


def _hotpotqa(row: dict, _) -> dict:
    """HotPotQA's distractor and full-wiki JSON, `hotpotqa/hotpot_qa`, and 2WikiMultiHopQA's JSON."""
    return {
        "id": row["_id"] if "_id" in row else row["id"],
        "question": row["question"],
        "golden_answers": _golden(row.get("answer")),
        "contexts": _passages(row["context"], row.get("supporting_facts")),
        "metadata": _kept(row, "type", "level"),
    }


def _strategyqa(row: dict, paragraphs: dict) -> dict:
    """The AI2 release: evidence is named by paragraph id, by several annotators; each paragraph is taken once."""
    ids = {}  # a dictionary keeps the order
    for annotator in row.get("evidence", []):
        for step in annotator:
            for item in step:  # a list of ids, or the word 'operation' or 'no_evidence'
                ids |= dict.fromkeys(item) if isinstance(item, list) else {}
    found = [paragraphs[i] for i in ids if i in paragraphs]
    if ids and paragraphs and not found:
        raise Skip("no evidence paragraph in the corpus")
    return {
        "id": row["qid"],
        "question": row["question"],
        "golden_answers": _golden(row.get("answer")),
        "contexts": [{"title": p["title"], "text": p["text"], "is_supporting": True} for p in found],
        "metadata": _kept(row, "term", "description", "facts", "decomposition"),
    }


def _dpr(row: dict, _) -> dict:
    """DPR's retrieval results. Its `has_answer` is a match of strings, so it is not taken for `is_supporting`."""
    context = lambda c: {"title": c.get("title") or "", "text": c["text"]}
    score = lambda c: {"score": float(c["score"])} if c.get("score") is not None else {}
    answers = row.get("answers", [])
    known = {name: row[name] for name in ("id", "_id", "q_id") if name in row}
    return {
        **({"id": next(iter(known.values()))} if known else {}),
        "question": row["question"],
        "golden_answers": _golden(*([answers] if isinstance(answers, str) else answers)),
        "contexts": [context(c) | score(c) for c in row["ctxs"]],
    }


def _ircot(row: dict, _) -> dict:
    """IRCoT's processed data; answers as in DROP: a number, spans or a date."""
    golden = {}
    for answer in row.get("answers_objects", []):
        date = answer.get("date") or {}
        spans = answer.get("spans") or [" ".join(date[part] for part in ("day", "month", "year") if date.get(part))]
        golden |= dict.fromkeys(_golden(answer.get("number")) or _golden(*spans))
    return {
        "id": row["question_id"],
        "question": row["question_text"],
        "golden_answers": list(golden),
        "contexts": [
            {"title": c.get("title", ""), "text": c["paragraph_text"]} | _kept(c, "is_supporting")
            for c in row["contexts"]
        ],
        "metadata": _kept(row, "dataset", "type", "level"),
    }


# In the order in which they are tried.
READERS = {
    "2wikimultihopqa": Reader(("question", "context", "evidences"), _hotpotqa),
    "hotpotqa": Reader(("question", "context"), _hotpotqa),
    "dpr": Reader(("question", "ctxs"), _dpr),
    "strategyqa": Reader(("qid", "question"), _strategyqa),
    "ircot": Reader(("question_text", "contexts"), _ircot),
    "unified": Reader((), _unified),
}


def detect(row: dict, where: str) -> str:
    """The name of the layout that a row's keys tell.

    Raises:
      UserError: the row is of a preference data set, which has an option of its own.
    """
    if "chosen" in row and "rejected" in row:
        raise UserError(f"{where}: these are pairs, not questions; name the file in config.data.pairs.")
    return next(name for name, reader in READERS.items() if all(key in row for key in reader.keys))


def convert(name: str, row: dict, paragraphs: dict, where: str) -> dict:
    """A row of the named layout as one of ours.

    Raises:
      Skip: it is well formed but of no use.
      UserError: it is not of this layout.
    """
    try:
        return READERS[name].read(row, paragraphs)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: not a row of {name} ({why}); see config.data.format.") from error
