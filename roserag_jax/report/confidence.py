"""Whether the theory holds: how confidences are distributed, the margins that predicts, and signs of failure.

    python -m roserag_jax.report.confidence runs/quickstart [--resamples 200] [--after scores.jsonl] [--output FOLDER]

Reads `candidates.jsonl` and, where they are, the evaluations and the training curve of a workdir. Fits exponential,
gamma, Weibull and normal distributions to the surprise (negative confidence) of correct and incorrect candidates, tests
each by parametric bootstrap, and sets the margins of hard, random and easy selection beside those that the exponential
assumption predicts. Then it looks for RoseRAG's signs of failure: EM that falls after K = 5, a gap between selected and
other pairs that narrows in training, training loss that falls while EM is flat. Writes `confidence.json`, quantile
plots (`quantiles.svg`, with the extra 'report') and `candidates_to_score.jsonl` to WORKDIR/confidence. The gap after
training needs the candidates' log-probabilities under the adapter: give that file to `roserag score`, and what it
writes to `--after`.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from roserag_jax import cli, options
from roserag_jax.errors import UserError
from roserag_jax.preference import rewards, selection
from roserag_jax.preference.labels import LABELS
from roserag_jax.rag import metrics
from roserag_jax.rag.answers import Measure
from roserag_jax.rag.files import read_rows
from roserag_jax.report import comparison
from roserag_jax.report.distributions import (
    OBSERVED,
    Fit,
    Surprises,
    exponential_margin,
    fit_families,
    observed_margins,
    simulated_margin,
)
from roserag_jax.report.tables import table
from roserag_jax.workdir import CANDIDATES, PAIRS, RETRIEVED, Workdir, from_jsonl, to_json, to_jsonl, write_atomic

_MOST_FITTED = 2000  # surprises of a side; of more, so many are drawn
_FEWEST = 8  # surprises of a side that a distribution is fitted to
_SIDES = ("correct", "incorrect")
_K = 5  # passages after which the paper's baselines fall


class Question(NamedTuple):
    """A question with its candidates that may be chosen and rejected."""

    row: dict
    right: list[dict]
    wrong: list[dict]


class Finding(NamedTuple):
    """One sign of failure: its name, whether it is seen (None: it cannot be told), and a sentence."""

    name: str
    seen: bool | None
    text: str


def read_questions(workdir: Workdir) -> tuple[list[Question], Any]:
    """The questions of a workdir as selection sorted their candidates, and the options of that selection.

    Raises:
      UserError: there are no candidates, or they were changed.
    """
    config = options.defaults()
    manifest = workdir.manifest(PAIRS) or workdir.manifest(CANDIDATES)
    if manifest is None:
        raise UserError(f"{workdir.path} holds no {CANDIDATES}; name the workdir of a run that has generated.")
    known = {name for name, _ in options.walk()}
    for name, value in manifest["options"].items():
        if name in known and not isinstance(value, dict):
            config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
    rows = rewards.joined(config.select, workdir, workdir.rows(CANDIDATES))
    K = (workdir.manifest(CANDIDATES) or manifest)["options"].get("prompt.passages")
    shown = {row["id"]: row.get("contexts", [])[:K] for row in workdir.rows(RETRIEVED["train"])}
    measure = Measure(config.evaluate.metric, config.data.language)
    found = []
    for row in rows:
        made = selection.outcome(row, shown[row["id"]], config.select, measure)
        if made.right or made.wrong:
            found.append(Question(row, made.right, made.wrong))
    return found, config.select


def surprises(questions: list[Question], kind: str) -> list[Surprises]:
    """Surprises of the questions that have candidates of both sides."""
    of = lambda candidates: np.array([-selection.confidence(c, kind) for c in candidates])
    return [Surprises(of(q.right), of(q.wrong)) for q in questions if q.right and q.wrong]


def fit_sides(questions: list[Question], kind: str, resamples: int, seed: int = 0) -> dict[str, list[Fit]]:
    """The families fitted to the surprises of correct and of incorrect candidates, the best first.

    Raises:
      UserError: one side has too few.
    """
    found = {}
    for side, candidates in zip(_SIDES, _sides(questions, kind), strict=True):
        if len(candidates) < _FEWEST:
            raise UserError(f"There are {len(candidates)} {side} candidates; {_FEWEST} are needed to fit anything.")
        found[side] = fit_families(candidates, resamples, seed)
    return found


def _sides(questions: list[Question], kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The surprises of all correct and of all incorrect candidates, at most some of each."""
    both = []
    for side in ("right", "wrong"):
        values = np.array([-selection.confidence(c, kind) for q in questions for c in getattr(q, side)])
        if len(values) > _MOST_FITTED:
            values = np.random.default_rng(seed).choice(values, _MOST_FITTED, replace=False)
        both.append(values)
    return both[0], both[1]


def margins(questions: list[Surprises], fits: dict[str, list[Fit]]) -> list[dict]:
    """Each strategy's mean margin: observed with its interval, predicted by exponentials, and by the best families."""
    counts = [(len(q.right), len(q.wrong)) for q in questions]
    mean = lambda side: float(next(fit for fit in fits[side] if fit.family == "exponential").frozen.mean())
    rows = []
    for strategy in OBSERVED:
        values = observed_margins(questions, strategy)
        low, high = metrics.interval(values)
        rows.append(
            {
                "strategy": strategy,
                "observed": float(values.mean()),
                "interval": [low, high],
                "exponential": exponential_margin(mean("correct"), mean("incorrect"), counts, strategy),
                "best": simulated_margin(fits["correct"][0].frozen, fits["incorrect"][0].frozen, counts, strategy),
            }
        )
    return rows


def em_after_five(folder: epath.Path) -> Iterator[Finding]:
    """Whether EM falls beyond five passages, for each system without noise."""
    name = f"EM falls after K = {_K}"
    try:
        results = comparison.load(folder)
    except UserError:
        yield Finding(name, None, "nothing has been evaluated")
        return
    plain = {n: r for n, r in results.items() if r["noise"] == "none" and r["system"] != "closed_book"}
    told = False
    for system in dict.fromkeys(r["system"] for r in plain.values()):
        by_k = {r["passages"]: n for n, r in plain.items() if r["system"] == system}
        beyond = [K for K in sorted(by_k) if K > _K]
        if _K not in by_k or not beyond:
            continue
        told = True
        at_five = comparison.scores_in(folder)(by_k[_K])
        for K in beyond:
            other = comparison.scores_in(folder)(by_k[K])
            ids = sorted(at_five.keys() & other.keys())
            test = metrics.paired([other[i]["em"] for i in ids], [at_five[i]["em"] for i in ids])
            low, high = (100 * edge for edge in test["interval"])
            text = f"{system}: EM changes by {100 * test['difference']:+.1f} [{low:+.1f}, {high:+.1f}] to K = {K}"
            yield Finding(name, bool(high < 0), text)
    if not told:
        what = f"roserag evaluate --config.evaluate.passages='(1, 2, {_K}, 8, 10)'"
        yield Finding(name, None, f"no system is evaluated at K = {_K} passages and beyond ({what})")


def gaps(questions: list[Question], kind: str, strategy: str) -> np.ndarray:
    """The gap of each question that has several pairs: the selected pair's margin minus the others' mean.

    It is below 0 for hard pairs, whose margin is the smallest.
    """
    found = []
    for q in questions:
        if len(q.right) * len(q.wrong) < 2:
            continue
        right, wrong = ([-selection.confidence(c, kind) for c in side] for side in (q.right, q.wrong))
        every = np.subtract.outer(np.array(wrong), np.array(right)).T  # margins [right, wrong]
        chosen = OBSERVED[strategy](Surprises(np.array(right), np.array(wrong)))
        found.append(chosen - (every.sum() - chosen) / (every.size - 1))
    return np.array(found)


def with_scores(questions: list[Question], file: str) -> list[Question]:
    """Questions whose candidates have the log-probabilities that `roserag score` wrote, row for row.

    Raises:
      UserError: the file has other rows.
    """
    rows = [row for _, row in read_rows(epath.Path(file).expanduser())]
    if len(rows) != len(questions):
        raise UserError(f"--after {file}: {len(rows)} rows for {len(questions)} questions; score candidates_to_score.")
    scored = []
    for number, (q, row) in enumerate(zip(questions, rows, strict=True), 1):
        both, sums, counts = [*q.right, *q.wrong], row.get("logprobs"), row.get("tokens")
        if not all(isinstance(values, list) and len(values) == len(both) for values in (sums, counts)):
            raise UserError(f"--after {file}, row {number}: not the scores of this question's candidates.")
        new = [{**c, "logprob": s, "tokens": n} for c, s, n in zip(both, sums, counts, strict=True)]
        scored.append(Question(q.row, new[: len(q.right)], new[len(q.right) :]))
    return scored


def gap_narrows(before: list[Question], after: list[Question] | None, kind: str, strategy: str) -> Finding:
    """Whether training brought selected and other pairs nearer to each other."""
    name, was = "the gap between selected and other pairs narrows", gaps(before, kind, strategy)
    if strategy not in ("hard", "easy"):
        return Finding(name, None, f"select.strategy={strategy} selects no particular pair")
    if not len(was):
        return Finding(name, None, "no question has more than one pair to choose from")
    text = f"before training the selected pairs' margin differs by {was.mean():+.3f} from that of the other pairs"
    if after is None:
        how = (
            "to see it after training, run `roserag score` on candidates_to_score.jsonl and name its output in --after"
        )
        return Finding(name, None, f"{text}; {how}")
    now = gaps(after, kind, strategy)
    change = np.abs(now) - np.abs(was)
    low, high = metrics.interval(change)
    text += f", after it by {now.mean():+.3f}; the gap's size changes by {change.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    return Finding(name, bool(high < 0), text)


def loss_without_em(workdir: Workdir) -> Finding:
    """Whether the training loss fell while EM stayed what it was."""
    name, file = "training loss falls while EM is flat", workdir / "metrics.jsonl"
    rows = from_jsonl(file.read_text()) if file.exists() else []
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if len(losses) < 4:
        return Finding(name, None, "there is no training curve of four steps")
    part = max(1, len(losses) // 5)
    first, last = np.mean(losses[:part]), np.mean(losses[-part:])
    text = f"the loss goes from {first:.3f} to {last:.3f}"
    try:
        results = comparison.load(workdir / "eval")
    except UserError:
        results = {}
    plain = {r["system"]: n for n, r in results.items() if r["noise"] == "none" and n in ("base", "adapter")}
    if len(plain) < 2:
        return Finding(name, None, f"{text}; base and adapter are not both evaluated")
    base, adapter = (comparison.scores_in(workdir / "eval")(plain[system]) for system in ("base", "adapter"))
    ids = sorted(base.keys() & adapter.keys())
    test = metrics.paired([adapter[i]["em"] for i in ids], [base[i]["em"] for i in ids])
    low, high = (100 * edge for edge in test["interval"])
    text += f", EM changes by {100 * test['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return Finding(name, bool(last < first and low <= 0), text)


def describe(fits: dict[str, list[Fit]], made: list[dict], findings: list[Finding], unit: str) -> str:
    """Everything as text."""
    parts = []
    if fits:
        parts.append(
            f"How sure the model is: surprise is minus the log-probability of a response under the plain prompt, in "
            f"{unit}.\nThe family with the lowest AIC describes it best; p < 0.05 says that the surprises are not from "
            "that family."
        )
    for side, of_side in fits.items():
        header = [f"surprise of {side} candidates", "AIC", "p (bootstrap)", "mean", "standard deviation"]
        body = [
            [fit.family, f"{fit.aic:.1f}", f"{fit.p:.3f}", f"{fit.frozen.mean():.3f}", f"{fit.frozen.std():.3f}"]
            for fit in of_side
        ]
        parts.append(table(header, body))
        exponential = next(fit for fit in of_side if fit.family == "exponential")
        verdict = "is rejected" if exponential.p < 0.05 else "is not rejected"
        parts.append(
            f"{side.capitalize()} candidates: an exponential distribution, which the theory assumes, {verdict} "
            f"(p = {exponential.p:.3f}); {of_side[0].family} fits best."
        )
    body = [
        [
            row["strategy"],
            f"{row['observed']:+.3f}  [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]",
            f"{row['exponential']:+.3f}",
            f"{row['best']:+.3f}",
        ]
        for row in made
    ]
    if body:
        parts.append(
            "The margin of a pair is the log-probability of its chosen candidate minus that of the rejected one, here "
            "the mean over\nquestions for each way to choose: as it is, and as it would be if surprises had these "
            "distributions."
        )
        parts.append(table([f"margin ({unit})", "observed  [95%]", "if exponential", "if the best families"], body))
    seen = {True: "SEEN", False: "not seen", None: "unknown"}
    parts.append("\n".join(["Signs of failure:", *(f"  {seen[f.seen]}: {f.name}: {f.text}." for f in findings)]))
    return "\n\n".join(parts)


def draw(sides: tuple[np.ndarray, np.ndarray], fits: dict[str, list[Fit]], output: Path, unit: str) -> None:
    """Write quantile plots: observed quantiles against those of every family, for both sides.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Plots need matplotlib: pip install -e '.[report]'.") from error
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(next(iter(fits.values()))), squeeze=False)
    for row, (side, values) in enumerate(zip(_SIDES, sides, strict=True)):
        values = np.sort(values)
        at = (np.arange(len(values)) + 0.5) / len(values)
        for column, fit in enumerate(sorted(fits[side], key=lambda fit: fit.family)):
            panel, expected = axes[row][column], fit.frozen.ppf(at)
            panel.plot(expected, values, ".", markersize=3)
            ends = [min(expected.min(), values.min()), max(expected.max(), values.max())]
            panel.plot(ends, ends, color="grey", linewidth=1)
            panel.set_title(f"{side}, {fit.family} (p = {fit.p:.3f})", fontsize=9)
            panel.set_xlabel(f"quantile of the fit ({unit})", fontsize=8)
            panel.set_ylabel("observed" if column == 0 else "", fontsize=8)
            panel.tick_params(labelsize=7)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)


def report(workdir: Workdir, output: epath.Path, resamples: int, after: str = "", picture: str = "svg") -> str:
    """Write the report of a workdir to a folder, and return it as text."""
    questions, select = read_questions(workdir)
    kind, unit = select.confidence, "nats a token" if select.confidence == "mean" else "nats"
    both, notes = surprises(questions, kind), []
    try:
        fits = fit_sides(questions, kind, resamples)
    except UserError as error:  # the signs of failure need no distribution
        fits = {}
        notes.append(f"No distribution was fitted: {error}")
    made = margins(both, fits) if both and fits else []
    paired = [q for q in questions if q.right and q.wrong]
    rows = [{"prompt": q.row["prompt"], "responses": [c["response"] for c in [*q.right, *q.wrong]]} for q in paired]
    scored = with_scores(paired, after) if after else None
    findings = [*em_after_five(workdir / "eval"), gap_narrows(paired, scored, kind, select.strategy)]
    findings.append(loss_without_em(workdir))
    content = {
        "fits": {side: [dataclasses.asdict(fit) for fit in of_side] for side, of_side in fits.items()},
        "margins": made,
        "findings": [finding._asdict() for finding in findings],
        "unit": unit,
        "questions": len(both),
    }
    write_atomic(output / "candidates_to_score.jsonl", to_jsonl(rows))
    write_atomic(output / "confidence.json", to_json(content, indent=2))
    if fits:
        try:
            draw(_sides(questions, kind), fits, Path(output / f"quantiles.{picture}"), unit)
        except UserError as error:  # nothing else needs matplotlib
            notes.append(f"No quantile plots: {error}")
    counts = f"{sum(len(q.right) for q in questions)} correct and {sum(len(q.wrong) for q in questions)} incorrect"
    head = (
        f"{counts} candidates of {len(questions)} questions, {len(both)} of them with both; "
        f"what is correct is said by {LABELS[select.labels].help} (config.select.labels={select.labels})."
    )
    return "\n\n".join([head, *notes, describe(fits, made, findings, unit)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="the workdir of a run")
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap samples of each test")
    parser.add_argument("--after", default="", help="what `roserag score` wrote for candidates_to_score.jsonl")
    parser.add_argument("--output", default="", help="folder to write to; WORKDIR/confidence without it")
    parser.add_argument("--picture", choices=("svg", "png"), default="svg", help="format of the quantile plots")
    arguments = parser.parse_args()
    if arguments.resamples < 19:
        raise UserError(f"--resamples {arguments.resamples}: 19 are the fewest that can show a p of 0.05.")
    workdir = Workdir(arguments.workdir)
    output = epath.Path(arguments.output).expanduser() if arguments.output else workdir / "confidence"
    print(report(workdir, output, arguments.resamples, arguments.after, arguments.picture))
    print(f"\nWrote {output}.")


if __name__ == "__main__":
    cli.guard(main)
