"""The report's evaluation: systems side by side over K and noise, and the questions that tell two of them apart."""

from typing import Any

from roserag_jax.errors import UserError
from roserag_jax.rag.metrics import SIMILARITY
from roserag_jax.report import comparison, plot
from roserag_jax.report.questions import sample
from roserag_jax.report.runs import Run


def evaluation(run: Run) -> dict[str, Any] | None:
    """Tables and charts of a run's evaluations; None where there are none."""
    if not run.metrics:
        return None
    found = [comparison.breakdown(run.metrics, key) for key in ("type", "gold_passages")]
    return {
        "intervals": [
            intervals(title, run.metrics, metric) for metric, title in comparison.measured(run.metrics).items()
        ],
        "charts": [chart for over in ("passages", "noise") for chart in _curves(run.metrics, over)],
        "tables": [table for table in found if len(table.header) > 2],
    }


def intervals(title: str, results: dict[str, dict], metric: str) -> dict[str, Any]:
    """A chart of scores with their intervals, a row for each evaluation."""
    having = {name: result for name, result in results.items() if metric in result}
    rows = [[name, result[metric], *result[f"{metric}_interval"]] for name, result in having.items()]
    return {"title": f"{title} with 95% intervals", "x": "percent", "rows": rows}


def _curves(results: dict[str, dict], over: str) -> list[dict[str, Any]]:
    """Charts of each measure over the number of passages or over noise; none where there is one value only."""
    try:
        axis, lines = plot.curves(results, over)
    except (UserError, ValueError):
        return []
    places = axis if over == "passages" else list(range(len(axis)))
    charts = []
    for metric, title in comparison.measured(results).items():
        series = [
            {
                "name": system,
                "points": [
                    [place, line[value][metric], *line[value][f"{metric}_interval"]]
                    for place, value in zip(places, axis, strict=True)
                    if metric in line.get(value, ())
                ],
            }
            for system, line in lines.items()
        ]
        if metric in (closed := results.get("closed_book", {})):
            series.append({"name": "closed_book", "points": [[place, closed[metric]] for place in places]})
        chart = {"title": f"{title} over {over}", "y": "percent", "note": "Bars are 95% intervals.", "series": series}
        names = None if over == "passages" else [value.replace("_", " ") for value in axis]
        charts.append(chart | {"x": {"passages": "passages shown (K)", "noise": "noise"}[over], "names": names})
    return charts


def _said(row: dict) -> list:
    """EM, F1 and text of a response, and what else it is measured by, with titles."""
    scores = row["scores"]
    others = [[title, scores[name]] for name, title in SIMILARITY.items() if name in scores]
    return [scores["em"], scores["f1"], row["response"], others]


def differences(run: Run, most: int) -> dict[str, Any]:
    """The held-out questions with what each system answered, for the page's table.

    Args:
      most: how many questions are taken, evenly spaced; `total` says of how many.
    """
    known: dict[str, dict] = {}
    for examples in run.examples.values():
        for row in examples:
            known.setdefault(row["id"], row)
    taken = sample(list(known.values()), most)
    ids = {row["id"] for row in taken}
    said: dict[str, dict[str, Any]] = {}
    for name in run.metrics:
        rows = {row["id"]: row for row in run.examples[name] if row["id"] in ids}
        said[name] = {i: _said(row) for i, row in rows.items()}
    return {
        "rows": [
            {
                "id": row["id"],
                "question": row["question"],
                "answers": row["golden_answers"],
                "type": row["scores"].get("type", ""),
                "said": {name: answers[row["id"]] for name, answers in said.items() if row["id"] in answers},
            }
            for row in taken
        ],
        "total": len(known),
        "systems": list(run.metrics),
    }
