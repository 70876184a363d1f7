"""The report's training curves: which charts there are, and their lines."""

from typing import Any

from roserag_jax.report.runs import Run
from roserag_jax.report.tables import Table
from roserag_jax.report.verdict import held_out_table

_MOST = 1500  # steps of a line; of more, every n-th is drawn
# Charts by title: what the axis shows, the metrics in it, and what they say. Other metrics get a chart of their own.
_CHARTS = (
    (
        "Loss and its terms",
        "nats",
        ("loss", "nll", "odds_loss", "held_out_loss"),
        "What training makes smaller: the chosen response's negative log-likelihood per token and, with ORPO, a term "
        "that falls as the chosen response becomes likelier than the rejected one.",
    ),
    (
        "Margin: chosen over rejected",
        "nats per token",
        ("margin", "held_out_margin"),
        "How much likelier the model finds the chosen response than the rejected one. It should rise above zero.",
    ),
    (
        "Log-probability per token",
        "nats per token",
        ("chosen_logprob", "rejected_logprob", "held_out_chosen_logprob", "held_out_rejected_logprob"),
        "How likely the model finds the two responses: 0 is certain. The distance of the lines is the margin.",
    ),
    (
        "Accuracy of preferences",
        "fraction of pairs",
        ("accuracy", "held_out_accuracy"),
        "In how many of a step's pairs the loss finds the chosen response the better one. It should rise to 1.",
    ),
    ("Answers to held-out questions", "percent", ("held_out_em", "held_out_f1"), "Answered while training."),
    (
        "Reward margin",
        "",
        ("reward_margin", "held_out_reward_margin"),
        "What a loss on preferences pushes up; its unit depends on the loss.",
    ),
    (
        "Log odds ratio",
        "nats",
        ("log_odds_ratio", "held_out_log_odds_ratio"),
        "The odds of the chosen response over those of the rejected one, by their mean log-probabilities.",
    ),
    ("Gradient norm", "", ("gradient_norm",), "Length of the gradient before it is clipped; a spike is a bad batch."),
    ("Learning rate", "", ("learning_rate",), "The size of the updates: it rises over the warm-up, then falls."),
    ("Tokens per second", "", ("tokens_per_s",), "Tokens of prompts and responses, without padding."),
    ("Pairs per second", "", ("pairs_per_s",), ""),
    (
        "Padding",
        "fraction of tokens",
        ("padding_fraction",),
        "Positions computed for nothing, to make a batch's rows alike.",
    ),
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
