"""Evaluations side by side: a table of systems, what it is made of, and paired tests against the base model.

    python -m roserag_jax.report.comparison runs/quickstart/eval [--against SYSTEM] [--markdown]

Reads the `metrics.json` and `examples.jsonl` that `evaluate` writes into each folder of a workdir's `eval/`.
"""

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from roserag_jax import cli
from roserag_jax.errors import UserError
from roserag_jax.rag import metrics
from roserag_jax.report.tables import Table, markdown, table
from roserag_jax.training.log import is_number
from roserag_jax.workdir import from_jsonl

# Of the passages shown: whether the retriever or the reader failed.
_RETRIEVAL = {"recall": "recall@K", "reciprocal_rank": "MRR", "answer_recall": "answer recall"}


def load(folder: epath.Path) -> dict[str, dict]:
    """The metrics of every finished evaluation under a folder, by name, in the order closed book, base, the others.

    Raises:
      UserError: there is none.
    """
    folder = epath.Path(folder).expanduser()
    names = [f.name for f in folder.iterdir() if (f / "manifest.json").exists()] if folder.is_dir() else []
    if not names:
        raise UserError(f"{folder} holds no evaluations; name the eval folder of a workdir.")
    return in_order({name: read_metrics(folder / name) for name in names})


def read_metrics(folder: epath.Path) -> dict:
    """The metrics of one evaluation.

    Raises:
      UserError: the file is absent or damaged.
    """
    file = folder / "metrics.json"
    try:
        result = json.loads(file.read_text())
        if not _is_result(result):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged; move {folder} away and evaluate again.") from error
    return result


def _is_result(result: dict) -> bool:
    """Whether metrics are such as `evaluate` writes."""
    yes_no, retrieval = result.get("yes_no"), result.get("retrieval", {})
    numbers = [
        result[name] for name in "questions em f1 contains parsed passages prompt_tokens response_tokens".split()
    ]
    numbers += [
        result["seconds_per_question"],
        *(value for m in metrics.measures_of(result) for value in (result[m], *_edges(result[f"{m}_interval"]))),
    ]
    numbers += [yes_no["accuracy"], *_edges(yes_no["accuracy_interval"])] if yes_no is not None else []
    numbers += [value for name, value in retrieval.items() if name in _RETRIEVAL]
    groups = [group for key in ("type", "gold_passages") for group in result[f"by_{key}"].values()]
    numbers += [group[name] for group in groups for name in ("em", "questions")]
    return all(map(is_number, numbers)) and all(isinstance(result[name], str) for name in ("system", "noise"))


def _edges(interval: list) -> list:
    low, high = interval
    return [low, high]


def in_order(results: dict[str, dict]) -> dict[str, dict]:
    """Metrics by name, sorted: closed book, base, the others; without noise first."""
    place = lambda name: (
        {"closed_book": 0, "base": 1}.get(results[name]["system"], 2),
        results[name]["noise"] != "none",
        *(results[name][key] for key in ("noise", "system", "passages")),
    )
    return {name: results[name] for name in sorted(results, key=place)}


def comparison(results: dict[str, dict]) -> Table:
    """A table of systems: scores in percent with their intervals, and tokens and time per question."""
    closed = results.get("closed_book")
    yes_no = any("yes_no" in result for result in results.values())
    measures = measured(results)
    header = ["system", *(f"{title}  [95%]" for title in measures.values()), "contains"] + ["yes/no  [95%]"] * yes_no
    retrieval = [name for name in _RETRIEVAL if any(name in r.get("retrieval", {}) for r in results.values())]
    header += [_RETRIEVAL[name] for name in retrieval]
    header += ["distraction"] * bool(closed) + ["answer line", "tokens in+out", "s/question", "questions"]
    rows = []
    for name, result in results.items():
        cells = [*(_interval(result, m) if m in result else "" for m in measures), f"{result['contains']:.1f}"]
        if yes_no:
            cells.append(_interval(result["yes_no"], "accuracy") if "yes_no" in result else "")
        for name_of_score in retrieval:
            score = result.get("retrieval", {}).get(name_of_score)
            cells.append("" if score is None else f"{score:.1f}")
        if closed:
            ratio = None if result is closed else metrics.distraction_ratio(closed["em"], result["em"])
            cells.append("" if ratio is None else f"{ratio:.2f}")
        tokens = f"{result['prompt_tokens']:.0f}+{result['response_tokens']:.0f}"
        cells += [f"{result['parsed']:.0f}%", tokens, f"{result['seconds_per_question']:.2f}", str(result["questions"])]
        rows.append([name, *cells])
    return Table(header, rows)


def measured(*of: dict[str, dict]) -> dict[str, str]:
    """The measures, with their titles, that an evaluation in each of some groups of metrics has."""
    held = [{name for result in results.values() for name in metrics.measures_of(result)} for results in of]
    return {name: title for name, title in metrics.MEASURES.items() if all(name in names for names in held)}


def breakdown(results: dict[str, dict], key: str) -> Table:
    """EM by group, with the number of questions of each: by question 'type' or by 'gold_passages' shown."""
    groups = sorted({group for result in results.values() for group in result[f"by_{key}"]})
    cell = lambda group: f"{group['em']:.1f} ({group['questions']})" if group else ""
    rows = [[name, *(cell(result[f"by_{key}"].get(g)) for g in groups)] for name, result in results.items()]
    title = {"type": "EM by type", "gold_passages": "EM by gold passages shown"}[key]
    return Table([title, *groups], rows)


class Comparison(NamedTuple):
    """A paired test of two evaluations, `name` minus `other`, by one of `metrics.MEASURES`; see `metrics.paired`."""

    name: str
    other: str
    metric: str
    test: dict


def paired_tests(
    results: dict[str, dict], scores: Callable[[str], dict[str, dict]], against: str = "base"
) -> list[Comparison]:
    """Test each system against another one with the same passages, question by question; none without the other.

    The closed book has no passages: it is set against the other system with the first K and no noise, or every system
    against it.

    Args:
      scores: the scores of an evaluation's questions, by their ids.

    Raises:
      UserError: two evaluations are of different questions.
    """
    others = {(r["passages"], r["noise"]): name for name, r in results.items() if r["system"] == against}
    plain = [name for (_, noise), name in others.items() if noise == "none"]
    found = []
    for name, result in results.items():
        other = others.get((result["passages"], result["noise"]))
        if "closed_book" in (result["system"], against):
            other = plain[0] if plain else None
        if other in (None, name):
            continue
        mine, theirs = scores(name), scores(other)
        if set(mine) != set(theirs):
            raise UserError(f"{name} and {other} are of different questions; evaluate them again.")
        for metric in measured({name: result}, {other: results[other]}):
            test = metrics.paired([mine[i][metric] for i in mine], [theirs[i][metric] for i in mine])
            found.append(Comparison(name, other, metric, test))
    return found


def paired(tests: list[Comparison]) -> Table:
    """Paired tests as a table."""
    rows = []
    for name, other, metric, test in tests:
        changed = [str(test["better"]), str(test["worse"])]
        rows.append([f"{name} - {other}", metrics.MEASURES[metric], difference(test), *changed, f"{test['p']:.3f}"])
    return Table(["paired", "score", "difference  [95%]", "better", "worse", "p"], rows)


def difference(test: dict) -> str:
    """A difference in percentage points with its interval."""
    low, high = (100 * edge for edge in test["interval"])
    return f"{100 * test['difference']:+.1f}  [{low:+.1f}, {high:+.1f}]"


def summary(folder: epath.Path, results: dict[str, dict], against: str = "base", as_markdown: bool = False) -> str:
    """All of the above as text, a blank line between."""
    tables = [
        comparison(results),
        paired(paired_tests(results, scores_in(folder), against)),
        *(breakdown(results, key) for key in ("gold_passages", "type")),
    ]
    return "\n\n".join((markdown if as_markdown else table)(*each) for each in tables if each.rows)


def _interval(result: dict, metric: str) -> str:
    low, high = result[f"{metric}_interval"]
    return f"{result[metric]:.1f}  [{low:.1f}, {high:.1f}]"


def scores_in(folder: epath.Path) -> Callable[[str], dict[str, dict]]:
    """A function of an evaluation's name in an eval folder: the scores of its questions by their ids."""

    def scores(name: str) -> dict[str, dict]:
        rows = from_jsonl((epath.Path(folder) / name / "examples.jsonl").read_text())
        return {row["id"]: row["scores"] for row in rows}

    return scores


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the eval folder of a workdir")
    parser.add_argument("--against", default="base", help="the system that the others are tested against")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    arguments = parser.parse_args()
    results = load(arguments.folder)
    known = sorted({result["system"] for result in results.values()})
    if arguments.against not in ("base", *known):
        raise UserError(f"--against {arguments.against}: no such system; there are {', '.join(known)}.")
    print(summary(epath.Path(arguments.folder), results, arguments.against, arguments.markdown))


if __name__ == "__main__":
    cli.guard(main)
