"""The report's funnel: what became of questions and samples on the way to pairs, and why some have none."""

import collections
import statistics
from typing import Any

import numpy as np

from roserag_jax.preference.selection import REASONS
from roserag_jax.rag.words import words
from roserag_jax.report.runs import Run
from roserag_jax.report.tables import Table

_DROPPED = {
    "no whole sentence": "ran into the token limit before a sentence ended",
    "repeated": "said what another sample of the question said",
    "too long": "longer than config.generate.max_tokens allows",
    "no answer": "led to no answer, or to one without an end",
    "unfinished": "ran into config.generate.max_tokens, and a cut would spoil it",
}
# What to do about it, where there is something.
ADVICE = {
    "no candidate": "Raise config.generate.max_tokens or the number of samples.",
    "all correct": "Leave it: the model knows the answer, and would learn nothing from it.",
    "none correct": "Raise config.generate.guided_samples or plain_samples; where no passage holds the answer, "
    "retrieve better.",
    "no evidence": "Look at the candidates; config.select.evidence=0 would accept them.",
    "no support": "Show more passages or retrieve better; config.select.supported=False would accept them.",
    "no majority": "Draw more samples (config.generate.plain_samples).",
    "low agreement": "Lower config.select.agreement, or draw more samples.",
    "no reward": "Lower config.select.reward_margin.",
    "one source only": "config.select.rejection=False needs guided and plain samples of each question.",
}


def outcome_of(run: Run, question: str) -> str:
    """What became of a question: 'pair', a reason why there is none, 'not selected' or 'not generated'."""
    if run.pairs_of.get(question):
        return "pair"
    if question not in run.outcomes:
        return "not generated" if run.pairs is None else "no pair"
    return "not selected" if run.pairs is None else run.outcomes[question].reason or "no pair"


def explain(outcome: str) -> str:
    """An outcome as a clause."""
    own = {
        "pair": "a chosen and a rejected candidate were selected",
        "not selected": "pairs were not selected yet",
        "not generated": "its candidates were not generated yet",
        "no pair": "pairs.jsonl holds none for it",
    }
    return own.get(outcome) or REASONS.get(outcome, outcome)


def funnel(run: Run) -> dict[str, Any] | None:
    """What the funnel shows; None where no candidate was generated and no pair selected."""
    if not run.candidates:
        return None
    outcomes = run.outcomes.values()
    total = len(run.retrieved.get("train", run.candidates))
    with_correct = sum(any(c["correct"] for c in found.candidates) for found in outcomes)
    with_both = sum({c["correct"] for c in found.candidates} >= {True, False} for found in outcomes)
    steps = [
        ("questions with passages", total, "retrieve"),
        ("with candidates", sum(bool(found.candidates) for found in outcomes), "sampled and verified"),
        ("with a correct candidate", with_correct, "reaches a golden answer on the plain prompt"),
        ("with a correct and an incorrect one", with_both, "both sides of a pair"),
    ]
    if run.pairs is not None:
        steps.append(("with a pair", len(run.pairs_of), f"{len(run.pairs)} pairs selected"))
    reasons = collections.Counter(outcome_of(run, row["id"]) for row in run.candidates)
    with_pair = sum(row["id"] in run.pairs_of for row in run.candidates)
    return {
        "paired": with_pair,
        "unpaired": 0 if run.pairs is None else len(run.candidates) - with_pair,
        "steps": [(name, number, number / total if total else 0.0, note) for name, number, note in steps],
        "reasons": [
            (name, number, number / len(run.candidates), explain(name), ADVICE.get(name, ""))
            for name, number in reasons.most_common()
            if name != "pair"
        ],
        "sources": _sources(run),
        "dropped": _dropped(run),
        "by_type": _acceptance(run, "question type", lambda row: str(row.get("metadata", {}).get("type", "all"))),
        "by_gold": _acceptance(run, "gold passages shown", lambda row: _gold_shown(run, row)),
        "histograms": histograms(run),
    }


def _sources(run: Run) -> Table:
    """Candidates by source: how many are correct, and how many of them were selected."""
    counts: dict[str, list[int]] = {}
    for question, found in run.outcomes.items():
        pairs = run.pairs_of.get(question, [])
        chosen, rejected = ({pair[side] for pair in pairs} for side in ("chosen", "rejected"))
        for c in found.candidates:
            tally = counts.setdefault(c["source"], [0] * 5)
            selected = (c["response"] in chosen, c["response"] in rejected)
            of = (1, c["correct"] is True, c["correct"] is False, *selected)
            counts[c["source"]] = [n + more for n, more in zip(tally, of, strict=True)]
    header = ["source", "candidates", "correct", "incorrect", "accepted", "chosen", "rejected"]
    percent = lambda right, of: f"{right / of:.0%}" if of else ""
    rows = [
        [source, str(n), str(right), str(wrong), percent(right, n), str(chosen), str(rejected)]
        for source, (n, right, wrong, chosen, rejected) in sorted(counts.items())
    ]
    return Table(header, rows)


def _dropped(run: Run) -> Table | None:
    """Samples that became no candidates, by reason."""
    counts = sum((collections.Counter(row.get("dropped", {})) for row in run.candidates), collections.Counter())
    if not counts:
        return None
    rows = [[name, str(number), _DROPPED.get(name, "")] for name, number in counts.most_common()]
    return Table(["dropped samples", "number", "because it"], rows)


def _gold_shown(run: Run, row: dict) -> str:
    flags = [c.get("is_supporting") for c in run.shown(row["id"])]
    return "unknown" if not flags or None in flags else str(sum(flags))


def _acceptance(run: Run, title: str, group_of) -> Table | None:
    """Questions, correct candidates and pairs by a group of questions; None where there is one group only."""
    groups: dict[str, list[str]] = {}
    for row in run.candidates:
        groups.setdefault(group_of(run.by_id.get(row["id"], row)), []).append(row["id"])
    if len(groups) < 2:
        return None
    rows = []
    for group, ids in sorted(groups.items()):
        found = [c for i in ids for c in run.outcomes[i].candidates]
        right = sum(bool(c["correct"]) for c in found)
        with_right = sum(any(c["correct"] for c in run.outcomes[i].candidates) for i in ids)
        with_pair = sum(i in run.pairs_of for i in ids)
        share = lambda part, of: f"{part} ({part / of:.0%})" if of else ""
        counts = [share(right, len(found)), share(with_right, len(ids)), share(with_pair, len(ids))]
        rows.append([group, str(len(ids)), *counts])
    return Table([title, "questions", "correct candidates", "with a correct one", "with a pair"], rows)


def histograms(run: Run) -> list[dict[str, Any]]:
    """Histograms of confidence and of length in words, chosen against rejected (of all pairs)."""
    if not run.pairs:
        return []
    found = []
    if all("chosen_logprob" in pair for pair in run.pairs):
        kind = run.config.select.confidence
        label = "log-probability per token" if kind == "mean" else "log-probability"
        values = [[pair[f"{side}_logprob"] for pair in run.pairs] for side in ("chosen", "rejected")]
        found.append(_histogram(f"Confidence ({label} on the plain prompt)", values))
    lengths = [[len(words(pair[side])) for pair in run.pairs] for side in ("chosen", "rejected")]
    found.append(_histogram("Length in words", lengths))
    return found


def _histogram(title: str, values: list[list[float]]) -> dict[str, Any]:
    """Counts of chosen and rejected values in common bins."""
    edges = np.histogram_bin_edges(np.concatenate(values), bins=min(20, max(5, len(values[0]) // 3)))
    counts = [np.histogram(side, edges)[0].tolist() for side in values]
    medians = [round(float(statistics.median(side)), 3) for side in values]
    return {
        "title": title,
        "edges": [round(float(edge), 4) for edge in edges],
        "series": [
            {"name": f"{name} (median {median:g})", "counts": side}
            for name, side, median in zip(("chosen", "rejected"), counts, medians, strict=True)
        ],
    }
