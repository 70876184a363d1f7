"""The report's comparison of several runs: what differs between them, and how they score on the same questions."""

import collections
from typing import Any

from roserag_jax.rag import metrics
from roserag_jax.report import comparison
from roserag_jax.report.curves import curves
from roserag_jax.report.runs import Run
from roserag_jax.report.systems import intervals
from roserag_jax.report.tables import Table

_CURVES = ("Loss and its terms", "Margin: chosen over rejected", "Accuracy of preferences")


def comparison_of(runs: list[Run]) -> dict[str, Any] | None:
    """What the comparison shows; None for a single run."""
    if len(runs) < 2:
        return None
    times = collections.Counter(name for run in runs for name in run.metrics)
    results = {f"{run.name}: {name}": result for run in runs for name, result in run.metrics.items() if times[name] > 1}
    return {
        "options": _differing(runs),
        "made": made(runs),
        "intervals": [intervals(title, results, metric) for metric, title in comparison.measured(results).items()],
        "tests": _tests(runs),
        "charts": _charts(runs),
    }


def _differing(runs: list[Run]) -> Table:
    """The options whose values differ between the runs."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    value = lambda run, name: str(run.options[name]) if name in run.options else "unknown"
    rows = [
        [f"config.{name}", *(value(run, name) for run in runs)]
        for name in names
        if len({value(run, name) for run in runs if name in run.options}) > 1
    ]
    return Table(["option", *(run.name for run in runs)], rows)


def made(runs: list[Run]) -> Table:
    """What each run made of its questions."""
    rows = []
    for run in runs:
        candidates = [c for row in run.candidates for c in row["candidates"]]
        right = sum(bool(c["correct"]) for c in candidates)
        accepted = f"{right / len(candidates):.0%}" if candidates else ""
        pairs = "" if run.pairs is None else str(len(run.pairs))
        loss = next((f"{row['loss']:.3f}" for row in reversed(run.steps) if row.get("loss") is not None), "")
        counts = [str(len(run.candidates)), str(len(candidates)), accepted, pairs, str(len(run.steps))]
        rows.append([run.name, *counts, loss])
    return Table(["run", "questions", "candidates", "correct", "pairs", "steps", "last loss"], rows)


def _tests(runs: list[Run]) -> Table:
    """Each evaluation of the other runs against the one of the same name in the first, on the questions of both."""
    first, rows = runs[0], []
    for run in runs[1:]:
        for name in run.metrics:
            if name not in first.metrics:
                continue
            mine, theirs = run.scores(name), first.scores(name)
            ids = [i for i in theirs if i in mine]
            if not ids or all(mine[i] == theirs[i] for i in ids):
                continue
            for metric, title in comparison.measured({name: run.metrics[name]}, {name: first.metrics[name]}).items():
                test = metrics.paired([mine[i][metric] for i in ids], [theirs[i][metric] for i in ids])
                changed = [comparison.difference(test), str(test["better"]), str(test["worse"]), f"{test['p']:.3f}"]
                rows.append([f"{name}: {run.name} - {first.name}", title, *changed, str(len(ids))])
    return Table(["paired", "score", "difference  [95%]", "better", "worse", "p", "questions of both"], rows)


def _charts(runs: list[Run]) -> list[dict[str, Any]]:
    """The first line of each of some training charts, the runs in one chart."""
    found = {run.name: {c["title"]: c for c in (curves(run) or {"charts": []})["charts"]} for run in runs}
    charts = []
    for title in _CURVES:
        of_runs = {name: charts[title] for name, charts in found.items() if title in charts}
        if of_runs:
            chart = next(iter(of_runs.values()))
            series = [{"name": name, "points": c["series"][0]["points"]} for name, c in of_runs.items()]
            charts.append({**chart, "title": chart["series"][0]["name"].capitalize(), "series": series})
    return charts
