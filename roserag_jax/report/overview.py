"""The report's summary: the verdict in two sentences, the scores, and what the run was made of."""

import contextlib
import dataclasses
import math
import statistics
from typing import Any

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.preference.selection import length_warning
from roserag_jax.rag.metrics import MEASURES
from roserag_jax.report import comparison
from roserag_jax.report.confidence import em_after_five, loss_without_em
from roserag_jax.report.runs import Run
from roserag_jax.report.several import made
from roserag_jax.report.tables import Table
from roserag_jax.report.verdict import overfitting

SURE = 0.05  # a smaller p tells two systems apart


def summary(run: Run) -> dict[str, Any]:
    """What the summary shows of a run."""
    tests, fault = paired_tests(run)
    seen = signs(run, tests)
    return {
        "verdict": [_result(run, tests), seen[0] if seen else _nothing_wrong(run)],
        "signs": seen[1:],
        "scores": comparison.comparison(run.metrics) if run.metrics else None,
        "tests": comparison.paired(tests) if tests else None,
        "fault": fault,
        "rounds": rounds(run),
        "facts": facts(run),
        "stages": stages(run),
        "commands": list(dict.fromkeys(stage["command"] for stage in run.stages if stage.get("command"))),
        "changed": changed_options(run),
        "notes": run.notes,
    }


def paired_tests(run: Run) -> tuple[list[comparison.Comparison], str]:
    """Each system against the base model, and why there are no tests where two are of different questions."""
    try:
        return comparison.paired_tests(run.metrics, run.scores), ""
    except (UserError, KeyError) as error:
        return [], str(error)


def _result(run: Run, tests: list[comparison.Comparison]) -> str:
    """Whether the adapter is better than the base model, not told apart from it, or worse."""
    systems = [test.name for test in tests if run.metrics[test.name]["system"] not in ("closed_book", "base")]
    # The one with the passages of the configuration has the system's name alone.
    first = next((name for name in systems if name == run.metrics[name]["system"]), next(iter(systems), None))
    if first is None:
        if not run.metrics:
            return "Nothing was evaluated, so there is no telling whether the adapter helps."
        return "The adapter and the base model were not both evaluated, so there is no telling whether it helps."
    of = {test.metric: test for test in tests if test.name == first}
    names = {"adapter": "the adapter", "base": "the base model"}
    one, other = (names.get(name, name) for name in (first, of["em"].other))
    sure = {metric: test.test for metric, test in of.items() if test.test["p"] < SURE}
    sides = {found["difference"] > 0 for found in sure.values()}
    if len(sides) == 1:
        by = f" by {MEASURES[min(sure)]}" if len(sure) < len(of) else ""
        found = f"{one} is {'better' if sides.pop() else 'worse'} than {other}{by}"
    else:
        found = f"{one} and {other} cannot be told apart"
    scores = [run.metrics[name] for name in (first, of["em"].other)]
    figures = [
        f"{MEASURES[metric]} {scores[0][metric]:.1f} against {scores[1][metric]:.1f}, "
        f"{comparison.difference(test.test)} points, {_p(test.test['p'])}"
        for metric, test in of.items()
    ]
    text = f"{found} on {scores[1]['questions']} held-out questions: {'; '.join(figures)}."
    return text[:1].upper() + text[1:]


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def signs(run: Run, tests: list[comparison.Comparison]) -> list[str]:
    """What looks wrong with the training, the most important first."""
    found = []
    if any(row.get("loss") is None for row in run.steps):
        found.append("Some training steps had a non-finite loss.")
    held_out = _same_measure(run)
    if held_out and (text := overfitting(run.steps, held_out, run.config.train.keep)):
        found.append(text)
    with contextlib.suppress(
        UserError, ValueError, KeyError, TypeError, AttributeError
    ):  # of damaged files, which are noted elsewhere
        findings = [*em_after_five(run.workdir / "eval")]
        if not any(test.test["p"] < SURE and test.test["difference"] > 0 for test in tests):  # by EM or F1
            findings.append(loss_without_em(run.workdir))
        found += [f"{each.name[:1].upper()}{each.name[1:]}: {each.text}." for each in findings if each.seen]
    margins = [row["margin"] for row in run.steps if row.get("margin") is not None]
    last = margins[-max(1, len(margins) // 5) :]
    if run.has_adapter and last and statistics.fmean(last) <= 0:
        found.append(
            f"At the end of training the rejected responses are still the likelier ones "
            f"(margin {statistics.fmean(last):+.2f} nats a token, mean of the last fifth of the steps)."
        )
    if run.pairs and "prompt" in run.pairs[0] and (text := length_warning(run.pairs)):
        found.append(f"By length alone chosen and rejected can be told apart: {text}")
    return found


def _same_measure(run: Run) -> list[dict]:
    """The held-out evaluations of the last one's measure."""
    return [row for row in run.held_out if row.get("measure") == run.held_out[-1].get("measure")]


def _nothing_wrong(run: Run) -> str:
    """What can be said where no sign of failure is seen."""
    if not run.steps:
        return "Nothing was trained yet."
    if not run.held_out:
        return (
            "Nothing looks wrong with the training curve; whether it overfits was not measured, because no pairs were "
            "held out (config.train.held_out)."
        )
    return "The held-out pairs show no overfitting, and nothing else looks wrong."


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run was made of, as names and values."""
    config = run.config
    found = [("Workdir", str(run.workdir.path))]
    if config.model:
        revision = f" at {config.revision}" if config.revision else ""
        found.append(("Model", f"{config.model}{revision}, {config.dtype}"))
    if run.has_adapter:
        lora, train = config.lora, config.train
        found.append(
            ("Adapter", f"LoRA rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; in adapter/")
        )
        found.append(
            (
                "Training",
                f"{train.loss}, {train.epochs} epochs in batches of {train.batch}, peak learning rate "
                f"{train.learning_rate:g}",
            )
        )
    for split, what in (("train", "Training questions"), ("eval", "Held-out questions")):
        if rows := run.retrieved.get(split):
            passages = statistics.fmean(len(row.get("contexts", [])) for row in rows)
            source = config.data[split] if f"data.{split}" in run.options else "unknown"
            retriever = f", from {config.retrieve.retriever}" if config.retrieve.retriever != "given" else ""
            found.append((what, f"{len(rows):,} ({source}), {passages:.1f} passages each{retriever}"))
    return found


def rounds(run: Run) -> Table | None:
    """What each round made; None where there is one."""
    if not run.rounds:
        return None
    last = dataclasses.replace(run, name=f"round {len(run.rounds) + 1}")
    return made([*run.rounds, last])


def stages(run: Run) -> Table | None:
    """Time and tokens of each stage; None where nothing is known."""
    seconds: dict[str, float] = {}
    for stage in run.stages:
        seconds[stage["stage"]] = seconds.get(stage["stage"], 0.0) + stage["seconds"]
    rows = []
    if run.candidates:
        found = [candidate for row in run.candidates for candidate in row["candidates"]]
        tokens = f"{sum(c['tokens'] for c in found):,} in {len(found):,} candidates"
        rows.append(
            [
                "generate",
                f"{len(run.candidates):,} questions",
                _clock(seconds.get(f"{run.workdir.label}generate")),
                tokens,
            ]
        )
    if run.steps:
        batch = run.config.train.batch
        if run.has_adapter and run.pairs:  # the last batch of an epoch may be a small one
            batch = min(batch, len(run.pairs) * run.config.train.epochs / len(run.steps))
        speeds = [(row.get("pairs_per_s"), row.get("tokens_per_s")) for row in run.steps]
        known = [(batch / pairs, tokens) for pairs, tokens in speeds if pairs and tokens]
        took = seconds.get("train") or sum(time for time, _ in known)
        tokens = sum(time * rate for time, rate in known)
        work = f"about {tokens:,.0f}, of prompts and responses"
        rows.append(["train", f"{len(run.steps):,} steps", _clock(took), work])
    for name, result in run.metrics.items():
        number = result["questions"]
        tokens = f"{number * result['prompt_tokens']:,.0f} in, {number * result['response_tokens']:,.0f} out"
        rows.append(
            [f"evaluate {name}", f"{number:,} questions", _clock(number * result["seconds_per_question"]), tokens]
        )
    return Table(["stage", "work", "time", "tokens"], rows) if rows else None


def _clock(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "not recorded"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def changed_options(run: Run) -> list[tuple[str, str, str, str]]:
    """The options that differ from their defaults: name, value, default, meaning; the paths of the run aside."""
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    return [
        (f"config.{name}", _written(run.options[name]), _written(plain(option.default)), option.help)
        for name, option in options.walk()
        if name in run.options
        and name not in ("model", "evaluate.noise")
        and run.options[name] != plain(option.default)
    ]


def _written(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else repr(value) if value == "" else str(value)
