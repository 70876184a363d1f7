"""The training log: a row for each step and each evaluation, in `metrics.jsonl` and for TensorBoard."""

import json

import numpy as np
from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.workdir import Workdir, append, is_remote, to_jsonl, write_atomic


def read_rows(path: epath.Path) -> tuple[list[dict], int]:
    """The rows of a `metrics.jsonl`, and how many of its lines are none (cut off in the middle, or damaged)."""
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [row for row in map(_row, lines) if row is not None]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict | None:
    """A line as a row; None if it is not one that `TrainingLog.write` wrote."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    numbers = all(value is None or is_number(value) for name, value in row.items() if name != "measure")
    return row if numbers and isinstance(row.get("measure", ""), str) else None


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number that fits a float."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_evaluation(row: dict) -> bool:
    """Whether a row is of an evaluation, not of a step."""
    return "held_out_loss" in row


class TrainingLog:
    """`metrics.jsonl` and TensorBoard events, cut back to the step that a run resumes from; in Weights & Biases every
    start is a run of its own.

    A step is a row, and so is an evaluation, whose metrics begin with 'held_out_'. Non-finite numbers are null.

    Args:
      folder: of this run's checkpoints. Its rows are kept there too, so that those of a run with other options in the
        same workdir are not taken for its own.
      wandb: Weights & Biases project; empty is none.
      options: those of the run, for Weights & Biases.
    """

    def __init__(self, workdir: Workdir, folder: epath.Path, *, wandb: str = "", options: dict | None = None):
        self.workdir, self.paths = workdir, (folder / "metrics.jsonl", workdir / "metrics.jsonl")
        self.project, self.options = wandb, options or {}
        self.all: list[dict] = []
        self.events = self.wandb = None

    def resume(self, done: int, evaluations: list[dict] = ()) -> "TrainingLog":
        """Open the log of a run that has done `done` steps; use it as a context manager.

        Args:
          evaluations: those that the checkpoint knows of; the file may have lost them.
        """
        self.all = self._known(done, evaluations) if done else []
        if not processes.is_main():
            return self
        for path in self.paths:
            write_atomic(path, to_jsonl(self.all))
        from tensorboardX import SummaryWriter

        self.events = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=done + 1)
        if self.project:
            import wandb

            here = None if is_remote(self.workdir.path) else str(self.workdir.path)
            self.wandb = wandb.init(project=self.project, dir=here, config=self.options)
        return self

    def _known(self, done: int, evaluations: list[dict]) -> list[dict]:
        """The rows up to step `done`, of the file and of the checkpoint."""
        rows, damaged = read_rows(self.paths[0])
        rows = [row for row in rows if 0 <= row["step"] <= done]
        steps = {row["step"]: row for row in rows if not is_evaluation(row)}
        if damaged or len(steps) < done:
            print(
                f"{self.paths[0]} lacks {done - len(steps)} of {done} steps ({damaged} damaged lines). Training "
                "resumes; its curve has a gap there."
            )
        known = {(row["step"], row.get("measure")): row for row in [*filter(is_evaluation, rows), *evaluations]}
        return sorted([*steps.values(), *known.values()], key=lambda row: (row["step"], is_evaluation(row)))

    def __enter__(self) -> "TrainingLog":
        return self

    @property
    def steps(self) -> list[dict]:
        """The rows of steps."""
        return [row for row in self.all if not is_evaluation(row)]

    @property
    def evaluations(self) -> list[dict]:
        """The rows of evaluations."""
        return [row for row in self.all if is_evaluation(row)]

    def add(self, row: dict) -> None:
        """Add a row, as `round_row` makes it."""
        self.all.append(row)
        if not self.events:
            return
        if not is_remote(self.paths[0]):
            for path in self.paths:
                append(path, to_jsonl([row]))
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, float)}
        for name, value in numbers.items():
            self.events.add_scalar(f"train/{name}", value, row["step"])
        if self.wandb:
            self.wandb.log({f"train/{name}": value for name, value in numbers.items()}, step=row["step"])

    def save(self) -> None:
        """In a bucket, where no row is appended by itself, write all; to be called before a checkpoint of theirs."""
        if is_remote(self.paths[0]) and processes.is_main():
            for path in self.paths:
                write_atomic(path, to_jsonl(self.all))

    def __exit__(self, *_) -> None:
        self.save()
        if self.events:
            self.events.close()
        if self.wandb:
            self.wandb.finish()


def round_row(step: int, metrics: dict[str, float], **labels: str) -> dict:
    """A row of the log: metrics to six decimals, non-finite ones as None, and labels."""
    numbers = {name: round(float(value), 6) if np.isfinite(value) else None for name, value in metrics.items()}
    return {"step": step, **numbers, **labels}
