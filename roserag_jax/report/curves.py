"""The report's training curves: which charts there are, and their lines."""

from typing import Any

from roserag_jax.report.runs import Run
from roserag_jax.report.tables import Table
from roserag_jax.report.verdict import held_out_table

_MOST = 1500  # steps of a line; of more, every n-th is drawn
# Charts by title: what the axis shows, the metrics in it, and what they say. Other metrics get a chart of their own.
_CHARTS = (
    ("Loss and its terms", "nats", ("loss", "nll", "odds_loss", "held_out_loss"), "Lower is better."),
    (
        "Margin: chosen over rejected",
        "nats per token",
        ("margin", "held_out_margin"),
        "Above zero the chosen response is the likelier one.",
    ),
    (
        "Log-probability per token",
        "nats per token",
        ("chosen_logprob", "rejected_logprob", "held_out_chosen_logprob", "held_out_rejected_logprob"),
        "The distance of the lines is the margin.",
    ),
    (
        "Accuracy of preferences",
        "fraction of pairs",
        ("accuracy", "held_out_accuracy"),
        "The fraction of pairs whose chosen response gets the larger reward.",
    ),
    ("Answers to held-out questions", "percent", ("held_out_em", "held_out_f1"), ""),
    ("Gradient norm", "", ("gradient_norm",), "Before clipping."),
    ("Learning rate", "", ("learning_rate",), ""),
    ("Tokens per second", "", ("tokens_per_s",), "Real tokens of prompts and responses, padding aside."),
    ("MFU", "fraction", ("mfu",), "FLOPs that the step needs over what a large matmul reaches on the same devices."),
)
_LABELS = {
    "nll": "negative log-likelihood",
    "odds_loss": "odds-ratio term",
    "chosen_logprob": "chosen",
    "rejected_logprob": "rejected",
    "tokens_per_s": "tokens per second",
    "pairs_per_s": "pairs per second",
    "peak_memory_gb": "peak memory of a device (GB)",
    "em": "EM",
    "f1": "F1",
    "mfu": "MFU",
}


def label(metric: str) -> str:
    """What a metric is called."""
    held_out = metric.removeprefix("held_out_")
    name = _LABELS.get(held_out, held_out.replace("_", " "))
    return f"{name}, held out" if held_out != metric else name


def curves(run: Run) -> dict[str, Any] | None:
    """The charts of a run's training, and its held-out evaluations as a table; None before the first step."""
    if not run.steps and not run.held_out:
        return None
    every = -(-len(run.steps) // _MOST) or 1
    steps = [row for place, row in enumerate(run.steps) if place % every == 0 or place == len(run.steps) - 1]
    names = {name: None for row in (*steps, *run.held_out) for name in row if name not in ("step", "measure")}
    lines = {name: _line(name, run.held_out if name.startswith("held_out_") else steps) for name in names}
    charts = [
        _chart(title, unit, [lines.pop(name) for name in metrics if name in lines], note)
        for title, unit, metrics, note in _CHARTS
    ]
    charts += [_chart(line["name"][:1].upper() + line["name"][1:], "", [line], "") for line in lines.values()]
    return {
        "charts": [chart for chart in charts if chart["series"]],
        "every": every,
        "steps": len(run.steps),
        "held_out": _held_out(run),
    }


def _held_out(run: Run) -> Table | None:
    if not run.held_out:
        return None
    measure = run.held_out[-1].get("measure")
    return held_out_table(run.steps, [row for row in run.held_out if row.get("measure") == measure])


def _line(name: str, rows: list[dict]) -> dict[str, Any]:
    """A metric as points `[step, value]`; a value that was non-finite is None, and leaves a gap."""
    return {"name": label(name), "points": [[row["step"], row.get(name)] for row in rows if name in row]}


def _chart(title: str, unit: str, series: list[dict], note: str) -> dict[str, Any]:
    return {"title": title, "x": "step", "y": unit, "note": note, "series": series}
