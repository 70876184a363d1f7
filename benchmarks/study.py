"""The study: base model, fine-tuning, RoseRAG and its ablations with one budget, over passages and over noise.

    python -m benchmarks.study --workdir runs/study --train-rows 400 --eval-rows 250 [--config.section.option=value ...]

Every row is a workdir of its own under `--workdir`; what rows have in common (retrieved passages, candidates) is made
once in `shared/`, and so are the evaluations. Each step is one of the project's commands, so a run that was stopped
resumes with the same line. Each row trains on as many pairs as RoseRAG does in `--epochs` passes over its own: drawn if
it has more, in the nearest number of whole passes if it has fewer. Ends with `table.md`, `passages.svg` and
`noise.svg` (the pictures need matplotlib). Further options go to every command.

    sft_answers      likelihood of the golden answer alone
    sft_rationales   likelihood of an accepted rationale, drawn
    roserag          ORPO on the hardest pair of each question
    no_rejection     chosen and rejected are not checked
    random, easy, all  other pairs than the hardest
    supported        the hardest pair where a passage holds the answer
    dpo, simpo       other losses on RoseRAG's pairs
    self_consistency the hardest pair, judged by what most samples say instead of the golden answer
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from roserag_jax.errors import UserError
from roserag_jax.evaluate import artifact
from roserag_jax.report import comparison, plot
from roserag_jax.report.tables import markdown
from roserag_jax.workdir import from_jsonl, to_jsonl, write_atomic

ROWS = {
    "roserag": {},  # first: its pairs are the budget
    "sft_answers": {"train.loss": "sft"},
    "sft_rationales": {"train.loss": "sft", "select.strategy": "random"},
    "no_rejection": {"select.rejection": False},
    "random": {"select.strategy": "random"},
    "easy": {"select.strategy": "easy"},
    "all": {"select.strategy": "all"},
    "supported": {"select.supported": True},
    "dpo": {"train.loss": "dpo"},
    "simpo": {"train.loss": "simpo"},
    "self_consistency": {"select.labels": "self_consistency"},
}
CURVES = ("roserag", "sft_rationales")  # beside the base model
NOISE = ("shuffled", "no_gold", "random1", "random3", "same_topic1", "same_topic3", "counterfactual1")


def command(stage: str, arguments, workdir: Path, **changes) -> None:
    """Run one of the project's commands; the study stops where it fails."""
    changes = {"workdir": str(workdir), "data.train_rows": arguments.train_rows, **changes}
    changes |= {"data.eval_rows": arguments.eval_rows}
    line = [sys.executable, "-m", f"roserag_jax.{stage}", "--config", arguments.config, *arguments.rest]
    line += [
        f"--config.{name}={value!r}" if isinstance(value, tuple) else f"--config.{name}={value}"
        for name, value in changes.items()
    ]
    print(f"\n== {stage} {workdir.name}: {changes}", flush=True)
    process = subprocess.Popen(line)
    try:
        code = process.wait()
    except BaseException:  # ended from outside: the command saves what it has
        process.terminate()
        process.wait()
        raise
    if code:
        sys.exit(code)


def rows_of(file: Path) -> list[dict]:
    """Rows of a file of JSON lines."""
    return from_jsonl(file.read_text())


def take_over(shared: Path, folder: Path) -> None:
    """Copy what the rows have in common, with its manifests: the commands then keep it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("retrieved.jsonl", "candidates.jsonl"):
        for file in (name, f"{name}.manifest.json"):
            shutil.copyfile(shared / file, folder / file)


def train(arguments, name: str, budget: int) -> int:
    """Make the pairs of a row and train on `budget` of them in all (0: on every pair `--epochs` times).

    Returns:
      How many pairs the row trains on, passes counted.
    """
    shared, folder, changes = arguments.workdir / "shared", arguments.workdir / name, dict(ROWS[name])
    if "select.labels" not in changes:  # with other labels guided prompts show other answers: candidates of its own
        take_over(shared, folder)
    pairs = folder / "pairs.jsonl"
    if name == "sft_answers":
        file = folder / "answers.jsonl"
        of_roserag = {pair["id"]: pair for pair in rows_of(arguments.workdir / "roserag/pairs.jsonl")}
        golden = {row["id"]: row["golden_answers"][0] for row in rows_of(shared / "candidates.jsonl")}
        # The rejected response is RoseRAG's; this loss does not look at it.
        made = [{**pair, "chosen": f"Answer: {golden[i]}"} for i, pair in of_roserag.items()]
        write_atomic(file, to_jsonl(made))
        changes["data.pairs"] = str(file)
    command("select", arguments, folder, **changes)
    count = len(rows_of(pairs))
    budget = budget or arguments.epochs * count
    if count > budget:  # 'all' has more than one pair a question
        file = folder / "drawn.jsonl"
        write_atomic(file, to_jsonl(random.Random(0).sample(rows_of(pairs), budget)))
        changes, count = {**changes, "data.pairs": str(file)}, budget
    epochs = max(1, round(budget / count))
    command("train", arguments, folder, **changes, **{"train.epochs": epochs, "train.evaluate": False})
    return budget


def report(arguments, names: set[str]) -> None:
    """Tables and pictures of the evaluations of these names; a folder may hold others, of calls before."""
    shared = arguments.workdir / "shared"
    results = {name: r for name, r in comparison.load(shared / "eval").items() if name in names}
    tables = [comparison.summary(shared / "eval", results, as_markdown=True)]
    tests = comparison.paired_tests(results, comparison.scores_in(shared / "eval"), "roserag")
    tables.append(markdown(*comparison.paired(tests)))
    write_atomic(arguments.workdir / "table.md", "\n\n".join(tables) + "\n")
    in_curves = {name: r for name, r in results.items() if r["system"] in ("closed_book", "base", *CURVES)}
    made = [arguments.workdir / "table.md"]
    for over, requested, known in (("passages", arguments.passages, arguments.at), ("noise", arguments.noise, "none")):
        if {*requested} - {known}:
            made.append(arguments.workdir / f"{over}.svg")
            plot.draw(in_curves, made[-1], over, passages=arguments.noise_at)
    print(f"Wrote {', '.join(map(str, made))}.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/study.py")
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--eval-rows", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--passages", type=int, nargs="*", default=(1, 2, 5, 8, 10))
    parser.add_argument("--at", type=int, default=5, help="K of the comparison of all rows")
    parser.add_argument("--noise-at", type=int, default=2, help="K before noise is added; evaluated without it too")
    parser.add_argument("--noise", nargs="*", default=NOISE)
    arguments, rest = parser.parse_known_args()
    arguments.rest = rest
    arguments.workdir = arguments.workdir.resolve()
    shared = arguments.workdir / "shared"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    command("generate", arguments, shared)
    requested = [name for name in ROWS if name in ("roserag", *arguments.rows)]
    budget = 0
    for name in requested:
        budget = train(arguments, name, budget)

    drawn = [name for name in CURVES if name in requested]
    evaluated = {"closed_book"}
    for names, passages, noise in (
        (requested, (arguments.at,), ("none",)),
        (drawn, tuple(arguments.passages), ("none",)),
        (drawn, (arguments.noise_at,), ("none", *arguments.noise) if arguments.noise else ()),
    ):
        if passages and noise:
            adapters = tuple(str(arguments.workdir / name / "adapter") for name in names)
            changes = {"evaluate.adapters": adapters, "evaluate.passages": passages, "evaluate.noise": noise}
            command("evaluate", arguments, shared, **{"evaluate.systems": ("closed_book", "base"), **changes})
            every = [artifact(name, K, n) for name in ("base", *names) for K in passages for n in noise]
            evaluated |= {name.removeprefix("eval/") for name in every}
    try:
        report(arguments, evaluated)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
