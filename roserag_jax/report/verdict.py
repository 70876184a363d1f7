"""What the evaluations while training say: a table, and whether training went on for too long."""

import numpy as np

from roserag_jax.report.tables import table
from roserag_jax.training.held_out import score


def verdict(steps: list[dict], evaluations: list[dict], keep: str) -> str:
    """The evaluations (of one measure) as a table, beside what training reached meanwhile, and what to do about it.

    Args:
      steps: the rows of steps; some may be missing.
      keep: `config.train.keep`.
    """
    fit = "margin" if any("margin" in step for step in steps) else "loss"
    names = [n for n in ("loss", "accuracy", "margin", "em", "f1") if f"held_out_{n}" in evaluations[0]]
    shown = lambda value: "" if value is None else f"{value:.3f}"
    reached, before = {}, 0
    for row in evaluations:
        values = [s[fit] for s in steps if before < s["step"] <= row["step"] and s[fit] is not None]
        before = row["step"]
        reached[before] = float(np.mean(values)) if values else None
    body = [
        [str(row["step"]), shown(reached[row["step"]]), *(shown(row[f"held_out_{n}"]) for n in names)]
        for row in evaluations
    ]
    text = table(["step", f"{fit} in training", *(f"held-out {n}" for n in names)], body)
    best, last = max(evaluations, key=score), evaluations[-1]
    was, now = reached[best["step"]], reached[last["step"]]
    better = None in (was, now) or (now > was) == (fit == "margin")
    if score(last) < score(best) and better:
        name = "f1" if "f1" in names else "loss"
        since = "" if was is None else f"from {shown(was)} "  # nothing was trained before an evaluation at step 0
        text += (
            f"\nOverfitting: from step {best['step']} to {last['step']} training's {fit} goes {since}to {shown(now)}, "
            f"the held-out {name} from {shown(best[f'held_out_{name}'])} to {shown(last[f'held_out_{name}'])}. "
        )
        text += "Set config.train.keep='best' or fewer epochs." if keep == "latest" else "Fewer epochs would do."
    return text
