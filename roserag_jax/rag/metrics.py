"""Scores of a whole evaluation: means with bootstrap intervals, and by question type and gold passages present."""

import collections

import numpy as np

from roserag_jax.rag import answers


def score_row(row: dict, prediction: str, parsed: bool) -> dict:
    """Scores of one prediction, and what the summary groups by.

    Args:
      row: a unified row with the contexts that were shown.
    """
    golden = row["golden_answers"]
    flags = [c.get("is_supporting") for c in row.get("contexts", [])]
    return {
        "em": answers.exact_match(prediction, golden),
        "f1": answers.f1(prediction, golden),
        "contains": answers.contains(prediction, golden),
        "parsed": float(parsed),
        "type": str(row.get("metadata", {}).get("type", "all")),
        "gold_passages": "unknown" if None in flags else str(sum(flags)),
    }


def interval(values: list[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean."""
    values = np.asarray(values)
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize(scores: list[dict]) -> dict:
    """Means in percent, intervals of EM and F1, and EM and F1 of each group."""
    percent = lambda name, rows=scores: round(100 * float(np.mean([row[name] for row in rows])), 2)
    result = {"questions": len(scores)} | {name: percent(name) for name in ("em", "f1", "contains", "parsed")}
    for name in ("em", "f1"):
        low, high = interval([row[name] for row in scores])
        result[f"{name}_interval"] = [round(100 * low, 2), round(100 * high, 2)]
    for key in ("type", "gold_passages"):
        groups = collections.defaultdict(list)
        for row in scores:
            groups[row[key]].append(row)
        result[f"by_{key}"] = {
            group: {"questions": len(rows), "em": percent("em", rows), "f1": percent("f1", rows)}
            for group, rows in sorted(groups.items())
        }
    return result
