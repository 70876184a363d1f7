"""What the evaluations while training say: a table, and whether training went on for too long."""

import numpy as np

from roserag_jax.report.tables import Table, table
from roserag_jax.training.held_out import score


def verdict(steps: list[dict], evaluations: list[dict], keep: str) -> str:
    """The evaluations (of one measure) as a table, beside what training reached meanwhile, and what to do about it.

    Args:
      steps: the rows of steps; some may be missing.
      keep: `config.train.keep`.
    """
    return "\n".join(filter(None, [table(*held_out_table(steps, evaluations)), overfitting(steps, evaluations, keep)]))


def held_out_table(steps: list[dict], evaluations: list[dict]) -> Table:
    """The evaluations beside what training reached meanwhile."""
    fit, reached = _reached(steps, evaluations)
    names = [n for n in ("loss", "accuracy", "margin", "em", "f1") if f"held_out_{n}" in evaluations[0]]
    rows = [
        [str(row["step"]), _shown(reached[row["step"]]), *(_shown(row[f"held_out_{n}"]) for n in names)]
        for row in evaluations
    ]
    return Table(["step", f"{fit} in training", *(f"held-out {n}" for n in names)], rows)


def overfitting(steps: list[dict], evaluations: list[dict], keep: str) -> str | None:
    """A sentence if what is held out got worse while training got better, and what to do; None if it did not."""
    fit, reached = _reached(steps, evaluations)
    best, last = max(evaluations, key=score), evaluations[-1]
    was, now = reached[best["step"]], reached[last["step"]]
    better = None in (was, now) or (now > was) == (fit == "margin")
    if score(last) >= score(best) or not better:
        return None
    name = "f1" if "held_out_f1" in last else "loss"
    since = "" if was is None else f"from {_shown(was)} "  # nothing was trained before an evaluation at step 0
    text = (
        f"Overfitting: from step {best['step']} to {last['step']} training's {fit} goes {since}to {_shown(now)}, "
        f"the held-out {name} from {_shown(best[f'held_out_{name}'])} to {_shown(last[f'held_out_{name}'])}. "
    )
    return text + ("Set config.train.keep='best' or fewer epochs." if keep == "latest" else "Fewer epochs would do.")


def _reached(steps: list[dict], evaluations: list[dict]) -> tuple[str, dict[int, float | None]]:
    """How well training fits, by margin or loss, and its mean between evaluations by their steps."""
    fit = "margin" if any("margin" in step for step in steps) else "loss"
    reached, before = {}, 0
    for row in evaluations:
        values = [s[fit] for s in steps if before < s["step"] <= row["step"] and s[fit] is not None]
        before = row["step"]
        reached[before] = float(np.mean(values)) if values else None
    return fit, reached


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
