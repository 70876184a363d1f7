"""Questions: rows of any known layout, read from files, from the Hub or from the synthetic world."""

import collections

from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.rag import layouts, synthetic
from roserag_jax.rag.corpora import read_corpus
from roserag_jax.rag.files import HUB, hub_rows, read_rows

# What a context may hold beside title and text: its types (a truth value is an int as well) and their name.
_OPTIONAL = {"is_supporting": (int, "truth value"), "score": ((int, float), "number")}


def read_questions(
    path: str,
    rows: int = 0,
    answers: bool = True,
    contexts: bool = True,
    layout: str = "auto",
    corpus: str = "",
    split: str = "train",
) -> list[dict]:
    """Rows `{id, question, golden_answers, contexts: [{title, text, is_supporting?}], metadata?}` of any known layout.

    A row that is of no use is left out; how many, and why, is printed.

    Args:
      rows: keep the first so many; 0 is all.
      answers: whether a row must have golden answers.
      contexts: whether a row must have contexts (it need not where a retriever will fetch them).
      layout: a name of `layouts.READERS`, or 'auto' to tell it by the first row.
      corpus: where StrategyQA's evidence paragraphs are.
      split: of a Hub data set that names none.

    Raises:
      UserError: the file has no rows that can be used, a row is not of its layout, or two rows share an id.
    """
    found, seen, skipped, first, paragraphs = [], {}, collections.Counter(), "", {}
    source = hub_rows(path, split) if path.startswith(HUB) else read_rows(epath.Path(path).expanduser())
    for number, (where, raw) in enumerate(source, 1):
        if rows and len(found) == rows:
            break
        if layout == "auto":
            layout = layouts.detect(raw, where)
        if layout == "strategyqa" and not paragraphs:
            if not corpus and contexts:
                raise UserError(
                    f"{path}: StrategyQA names its paragraphs by id; set config.retrieve.corpus to their file."
                )
            paragraphs = {p["id"]: p for p in read_corpus(corpus)} if corpus else {}
        try:
            row = _checked(layouts.convert(layout, raw, paragraphs, where), number, where, layout, answers, contexts)
        except layouts.Skip as reason:
            skipped[str(reason)] += 1
            first = first or f"{where} (id {raw.get('id', raw.get('_id', number))!r}): {reason}"
            continue
        if row["id"] in seen:
            raise UserError(f"{where}: id {row['id']!r} stands on {seen[row['id']]} already; ids must be unique.")
        seen[row["id"]] = where.rsplit(", ", 1)[1]
        found.append(row)
    if not found:
        raise UserError(f"{path} holds no questions{f' that can be used; {first}' if first else ''}.")
    if skipped:
        reasons = ", ".join(f"{n} for {reason}" for reason, n in skipped.items())
        print(f"{path} ({layout}): {len(found)} questions; left out {reasons}.")
    return found


def _checked(row: dict, number: int, where: str, layout: str, answers: bool, contexts: bool) -> dict:
    """A row of ours with its defaults filled in; what our own files must have is an error there."""
    empty = {"id": number, "contexts": [], "metadata": {}}
    row = {**row, **{name: value for name, value in empty.items() if row.get(name) is None}}
    row["id"] = str(row["id"])
    where = f"{where} (id {row['id']!r})"
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where}: no question.")
    golden = row.get("golden_answers", [])
    if answers and not (isinstance(golden, list) and golden and all(isinstance(a, str) and a.strip() for a in golden)):
        if layout != "unified":
            raise layouts.Skip("no answer")
        raise UserError(f"{where}: no answer; golden_answers must be a list of strings.")
    if contexts and not row["contexts"]:
        raise layouts.Skip("no contexts; add them, or set config.retrieve.retriever=bm25")
    if not isinstance(row["metadata"], dict):
        raise UserError(f"{where}: metadata must be an object.")
    if not isinstance(row["contexts"], list):
        raise UserError(f"{where}: contexts must be a list of {{title, text}}.")
    for context in row["contexts"]:
        if not isinstance(context, dict) or not isinstance(context.get("text"), str):
            raise UserError(f"{where}: a context must be {{title, text}}.")
        context["title"] = str(context.get("title") or "")
        for name, (kinds, what) in _OPTIONAL.items():
            if context.get(name) is None:
                context.pop(name, None)
            elif not isinstance(context[name], kinds):
                raise UserError(f"{where}: a context's {name} is {context[name]!r}; it must be a {what}.")
    return row


def questions(config, split: str) -> list[dict]:
    """The questions that `config.data.train` or `config.data.eval` names."""
    data, path = config.data, config.data[split]
    rows = data[f"{split}_rows"]
    if path != "synthetic":
        given = config.retrieve.retriever == "given"
        hub_split = {"train": "train", "eval": "validation"}[split]
        return read_questions(path, rows, True, given, data.format, config.retrieve.corpus, hub_split)
    return list(
        synthetic.generate(
            rows or {"train": 200, "eval": 100}[split],
            split,
            seed=data.synthetic_seed,
            passages=data.synthetic_passages,
            missing_gold=data.synthetic_missing_gold,
            counterfactual=data.synthetic_counterfactual,
        )
    )
