"""Questions: rows of any known layout, read from files, from the Hub or from the synthetic world."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

from roserag_jax.errors import UserError, quote
from roserag_jax.rag import layouts, synthetic
from roserag_jax.rag.corpora import Corpus
from roserag_jax.rag.files import open_rows

DOCUMENTS = "documents"


def read_questions(path: str, *arguments, **options) -> list[dict]:
    """Read all rows that `stream_questions` yields for the same arguments."""
    return list(stream_questions(path, *arguments, **options))


def stream_questions(
    path: str,
    rows: int = 0,
    answers: bool = True,
    contexts: bool = True,
    layout: str = "auto",
    corpus: str = "",
    split: str = "train",
    report: bool = True,
) -> Iterator[dict]:
    """Yield rows `{id, question, golden_answers, contexts: [{title, text, is_supporting?}], metadata?}` of any layout.

    A row that cannot be used is left out; how many, and why, is printed.

    Args:
      rows: keep the first so many; 0 is all.
      answers: whether a row must have golden answers.
      contexts: whether a row must have contexts (it need not where a retriever will fetch them).
      layout: a name of `layouts.READERS`, or 'auto' to recognize it by the first row.
      corpus: where StrategyQA's evidence paragraphs are.
      split: of a Hub data set that names none.
      report: whether to print what was left out.

    Raises:
      UserError: the file has no rows that can be used, a row is not of its layout, or two rows share an id.
    """
    count, seen, skipped, first, paragraphs = 0, {}, collections.Counter(), "", None
    for number, (where, raw) in enumerate(open_rows(path, split), 1):
        if rows and count == rows:
            break
        if layout == "auto":
            layout = layouts.detect(raw, where)
        if layout == "strategyqa" and paragraphs is None and (corpus or contexts):
            if not corpus:
                raise UserError(
                    f"{path}: StrategyQA names its paragraphs by id; set config.retrieve.corpus to their file."
                )
            paragraphs = _evidence(path, split, corpus)
        try:
            row = _checked(layouts.convert(layout, raw, paragraphs, where), number, where, layout, answers, contexts)
        except layouts.Skip as reason:
            skipped[str(reason)] += 1
            first = first or f"{where} (id {quote(raw.get('id', raw.get('_id', number)))}): {reason}"
            continue
        if row["id"] in seen:
            raise UserError(f"{where}: duplicate id {quote(row['id'])} (first on {seen[row['id']]}); ids are unique.")
        seen[row["id"]] = where.rsplit(", ", 1)[1]
        count += 1
        yield row
    if not count:
        raise UserError(f"{path} holds no questions{f' that can be used; {first}' if first else ''}.")
    if skipped and report:
        reasons = ", ".join(f"{n} for {reason}" for reason, n in skipped.items())
        print(f"{path} ({layout}): {count} questions; left out {reasons}.")


def _evidence(path: str, split: str, corpus: str) -> dict[str, dict]:
    """The paragraphs of a corpus that StrategyQA's questions name, by id: few of those that there are."""
    named = set()
    for _, raw in open_rows(path, split):
        with contextlib.suppress(TypeError):  # what is wrong with a row is told where it is converted
            named |= layouts.evidence(raw).keys()
    return {passage["id"]: passage for passage in Corpus(corpus).passages() if passage["id"] in named}


def _checked(row: dict, number: int, where: str, layout: str, answers: bool, contexts: bool) -> dict:
    """A row of ours with its defaults filled in; what rows of our own layout must have is an error there."""
    row = {"golden_answers": [], "contexts": [], "metadata": {}, **row}
    try:
        row["id"] = layouts.as_text(row.get("id", number))
    except TypeError as error:
        raise UserError(f"{where}: id: {error}.") from error
    where = f"{where} (id {quote(row['id'])})"
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where}: no question.")
    if answers and not row.get("golden_answers"):
        if layout != "unified":
            raise layouts.Skip("no answer")
        raise UserError(
            f"{where}: no answer; golden_answers must be a list of texts (questions without answers can be trained on "
            "with config.select.labels=self_consistency)."
        )
    if contexts and not row["contexts"]:
        raise layouts.Skip("no contexts; add them, or set config.retrieve.retriever=bm25")
    if not isinstance(row["metadata"], dict):
        raise UserError(f"{where}: metadata must be an object.")
    if not isinstance(row["contexts"], list):
        raise UserError(f"{where}: contexts must be a list of {{title, text}}.")
    return {**row, "contexts": [checked_context(context, where) for context in row["contexts"]]}


def checked_context(context: Any, where: str) -> dict:
    """A context `{title, text, score?, is_supporting?, source?}` with its values in their types.

    Raises:
      UserError: it has no text, or a value is of another type.
    """
    if not isinstance(context, dict) or not isinstance(context.get("text"), str):
        raise UserError(f"{where}: a context must be {{title, text}}, its text a string.")
    context = {**context, "title": context.get("title", "")}
    kinds = {"title": (layouts.as_text, "text"), "score": (layouts.as_number, "a finite number")}
    for name, (convert, kind) in kinds.items():
        if name not in context:
            continue
        try:
            context[name] = convert(context[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: a context's {name} is {quote(context[name])}; it must be {kind}.") from error
    if "is_supporting" in context:
        if context["is_supporting"] not in (0, 1):
            flag = quote(context["is_supporting"])
            raise UserError(f"{where}: a context's is_supporting is {flag}; it must be true or false.")
        context["is_supporting"] = bool(context["is_supporting"])
    return {name: value for name, value in context.items() if value is not None}


def source(config, split: str) -> str:
    """What the questions of a split are: a path, 'synthetic', or DOCUMENTS where the model writes them."""
    data = config.data
    return DOCUMENTS if data[split] == "synthetic" and data.train == DOCUMENTS else data[split]


def questions(config, split: str, report: bool = True, written: str = "") -> Iterator[dict]:
    """Yield the questions that `config.data.train` or `config.data.eval` names.

    Args:
      report: as in `stream_questions`.
      written: the file of those that the model has written, where they are.
    """
    data, path = config.data, written or source(config, split)
    rows = data[f"{split}_rows"]
    if path != "synthetic":
        given = config.retrieve.retriever == "given"
        hub_split = {"train": "train", "eval": "validation"}[split]
        answers = split == "eval" or config.select.labels == "gold"  # others look at no answer
        layout = "unified" if written else data.format
        return stream_questions(path, rows, answers, given, layout, config.retrieve.corpus, hub_split, report)
    return iter(
        synthetic.generate(
            rows or {"train": 200, "eval": 100}[split],
            split,
            seed=data.synthetic_seed,
            passages=data.synthetic_passages,
            missing_gold=data.synthetic_missing_gold,
            counterfactual=data.synthetic_counterfactual,
        )
    )
