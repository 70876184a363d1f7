"""Layouts in which public data sets come, each row of theirs turned into one of ours.

Ours is `{id, question, golden_answers, contexts: [{title, text, is_supporting?}], metadata}`. A layout is recognized by
the keys of its first row. To add one: a function of a row, and a line in `READERS`. Rows come from `rag.files`, where
null and NaN are absent keys.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.rag.files import parse_json


class Skip(Exception):
    """A row that cannot be used; the message is the reason, under which such rows are counted."""


class Reader(NamedTuple):
    """The keys by which a layout is recognized, and the function of a row and paragraphs by id that reads it."""

    keys: tuple[str, ...]
    read: Callable[[dict, dict | None], dict]


def as_text(value: Any) -> str:
    """A text, number or boolean as the text that a person would write: yes for true, 1801 for 1801.0.

    Raises:
      TypeError: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # a table with gaps makes floats of its whole numbers
    if isinstance(value, int | float):
        return str(value)
    raise TypeError(f"text or a number is expected, not {quote(value)}")


def as_number(value: Any) -> float | None:
    """A number, also where it is written as text; None for NaN.

    Raises:
      TypeError, ValueError, OverflowError: it is something else, or not finite.
    """
    if isinstance(value, bool):
        raise TypeError(f"a number is expected, not {value}")
    number = float(value)
    if math.isinf(number):
        raise ValueError(f"a finite number is expected, not {quote(value)}")
    return None if math.isnan(number) else number


def golden_answers(*answers: Any) -> list[str]:
    """Golden answers as text, each once; lists within lists are flattened, absent and blank ones left out.

    Raises:
      TypeError: an answer is not text, number or boolean.
    """

    def flat(values: Any) -> Iterator[str]:
        for value in values:
            if isinstance(value, list):
                yield from flat(value)
            elif value is not None:
                yield as_text(value)

    return [text for text in dict.fromkeys(flat(answers)) if text.strip()]


def _embedded(value: Any) -> Any:
    """A list or object, also where a table holds it as JSON text (2WikiMultiHopQA on the Hub)."""
    return parse_json(value, "JSON within the row") if isinstance(value, str) else value


def _joined(text: Any, space: str) -> str:
    if not isinstance(text, str | list):
        raise TypeError(f"sentences are expected, not {quote(text)}")
    return text if isinstance(text, str) else space.join(text)


def _passages(context: Any, facts: Any) -> list[dict]:
    """Contexts from titles and sentences, in the releases' layout (pairs) or the Hub's and FlashRAG's (two lists)."""
    context, facts = _embedded(context), _embedded(facts)
    if isinstance(context, dict):
        titles, sentences = context["title"], context["sentences"] if "sentences" in context else context["content"]
        if not isinstance(titles, list) or not isinstance(sentences, list):
            raise TypeError("a context is a list of titles and a list of their sentences")
        context = list(zip(titles, sentences, strict=True))
    # HotPotQA's sentences bring their own spaces, 2WikiMultiHopQA's do not.
    edges = [a[-1:] + b[:1] for _, text in context if isinstance(text, list) for a, b in itertools.pairwise(text)]
    space = "" if any(" " in edge for edge in edges) else " "
    passages = [{"title": title, "text": _joined(text, space)} for title, text in context]
    if facts is None:  # the test sets' secret
        return passages
    gold = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
    return [{**passage, "is_supporting": passage["title"] in gold} for passage in passages]


def _kept(row: dict, *names: str) -> dict:
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def _id(row: dict, *names: str) -> dict:
    """The id under the first of the names that a row has."""
    return {"id": next(row[name] for name in names if name in row)} if any(name in row for name in names) else {}


def _unified(row: dict, _) -> dict:
    """Our rows and FlashRAG's, whose HotPotQA and 2WikiMultiHopQA carry their paragraphs in `metadata`."""
    metadata = row.get("metadata")
    if "golden_answers" in row:
        row = {**row, "golden_answers": golden_answers(row["golden_answers"])}
    if not row.get("contexts") and isinstance(metadata, dict) and metadata.get("context"):
        rest = {k: v for k, v in metadata.items() if k != "context"}
        contexts = _passages(metadata["context"], metadata.get("supporting_facts"))
        return {**row, "contexts": contexts, "metadata": rest}
    return row


def _hotpotqa(row: dict, _) -> dict:
    """HotPotQA's distractor and full-wiki JSON, `hotpotqa/hotpot_qa`, and 2WikiMultiHopQA's release and Hub copies."""
    return {
        "id": row["_id"] if "_id" in row else row["id"],
        "question": row["question"],
        "golden_answers": golden_answers(row.get("answer")),
        "contexts": _passages(row["context"], row.get("supporting_facts")),
        "metadata": _kept(row, "type", "level"),
    }


def evidence(row: dict) -> dict[str, None]:
    """The ids of the paragraphs that a row of StrategyQA names, each once, in order."""
    ids = {}  # a dictionary keeps the order
    annotators = row.get("evidence", [])
    for step in (step for annotator in annotators for step in annotator):
        for item in step:  # a list of ids, or the word 'operation' or 'no_evidence'
            ids |= dict.fromkeys(item) if isinstance(item, list) else {}
    return ids


def _strategyqa(row: dict, paragraphs: dict | None) -> dict:
    """The AI2 release: evidence is named by paragraph id, by several annotators; each paragraph is taken once."""
    ids = evidence(row)
    found = [paragraphs[i] for i in ids if i in paragraphs] if paragraphs is not None else []
    if ids and paragraphs is not None and not found:
        raise Skip("no evidence paragraph in the corpus")
    return {
        "id": row["qid"],
        "question": row["question"],
        "golden_answers": golden_answers(row.get("answer")),
        "contexts": [{"title": p["title"], "text": p["text"], "is_supporting": True} for p in found],
        "metadata": _kept(row, "term", "description", "facts", "decomposition"),
    }


def _dpr(row: dict, _) -> dict:
    """DPR's retrieval results. Its `has_answer` is a match of strings, so it is not taken for `is_supporting`."""
    context = lambda c: {name: c[name] for name in ("title", "text", "score") if name in c}
    return {
        **_id(row, "id", "_id", "q_id"),
        "question": row["question"],
        "golden_answers": golden_answers(row.get("answers")),
        "contexts": [context(c) for c in row["ctxs"]],
    }


def _ircot(row: dict, _) -> dict:
    """IRCoT's processed data; answers as in DROP: a number, spans or a date."""
    golden = []
    for answer in row.get("answers_objects", []):
        date = answer.get("date") or {}
        day = " ".join(as_text(date[part]) for part in ("day", "month", "year") if date.get(part))
        golden += golden_answers(answer.get("number")) or golden_answers(answer.get("spans") or day)
    return {
        "id": row["question_id"],
        "question": row["question_text"],
        "golden_answers": golden_answers(golden),
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
    """The name of the layout whose keys a row has.

    Raises:
      UserError: the row is of a preference data set, which has an option of its own.
    """
    if "chosen" in row and "rejected" in row:
        raise UserError(f"{where}: these are pairs, not questions; name the file in config.data.pairs.")
    return next(name for name, reader in READERS.items() if all(key in row for key in reader.keys))


def convert(name: str, row: dict, paragraphs: dict | None, where: str) -> dict:
    """A row of the named layout as one of ours.

    Raises:
      Skip: it is well formed but of no use.
      UserError: it is not of this layout.
    """
    try:
        return READERS[name].read(row, paragraphs)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, UserError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{where}: not a row of {name} ({why}); see config.data.format.") from error
