"""What training leaves to look at: its numbers step by step, and what its evaluations say."""

import numpy as np
from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.report.tables import table
from roserag_jax.workdir import Workdir, from_jsonl, is_remote, to_jsonl, write_atomic


class TrainingLog:
    """`metrics.jsonl` and TensorBoard events, cut back to the step that a resumed run starts from; in Weights &
    Biases every start is a run of its own.

    A step is a row, and so is an evaluation, whose names begin with 'held_out_'. Numbers that are none are null.

    Args:
      folder: of this run's checkpoints. Its rows are kept there too, so that those of a run with other options in the
        same workdir are not taken for its own.
      done: the step that the run starts from.
    """

    def __init__(self, workdir: Workdir, folder: epath.Path, done: int, config):
        self.paths = folder / "metrics.jsonl", workdir / "metrics.jsonl"
        before = from_jsonl(self.paths[0].read_text()) if done and self.paths[0].exists() else []
        self.all = [row for row in before if row["step"] <= done]
        self.events = self.wandb = None
        if not processes.is_main():
            return
        for path in self.paths:
            write_atomic(path, to_jsonl(self.all))
        from tensorboardX import SummaryWriter

        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=done + 1)
        if config.train.wandb:
            import wandb

            here = None if is_remote(workdir.path) else str(workdir.path)
            self.wandb = wandb.init(project=config.train.wandb, dir=here, config=config.to_dict())

    def __enter__(self):
        return self

    @property
    def rows(self) -> list[dict]:
        """The steps."""
        return [row for row in self.all if "loss" in row]

    @property
    def evaluations(self) -> list[dict]:
        """The evaluations."""
        return [row for row in self.all if "held_out_loss" in row]

    def write(self, step: int, metrics: dict) -> dict:
        """Add a row and return it."""
        row = {name: round(float(value), 6) if np.isfinite(value) else None for name, value in metrics.items()}
        self.all.append({"step": step, **row})
        if self.events:
            if not is_remote(self.paths[0]):
                for path in self.paths:
                    with path.open("a") as file:
                        file.write(to_jsonl(self.all[-1:]))
            seen = {f"train/{name}": value for name, value in row.items() if value is not None}
            for name, value in seen.items():
                self.events.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log(seen, step=step)
        return self.all[-1]

    def save(self) -> None:
        """In a bucket, where no row is appended by itself, write all; to be called before a checkpoint of theirs."""
        if is_remote(self.paths[0]) and processes.is_main():
            for path in self.paths:
                write_atomic(path, to_jsonl(self.all))

    def summarize(self) -> None:
        """Print what a person should know of the whole run."""
        if skipped := sum(row.get("skipped", 0) for row in self.rows):
            print(f"{skipped:.0f} of {len(self.rows)} steps had a loss or gradient that is no number and were skipped.")

    def __exit__(self, *_):
        self.save()
        if self.events:
            self.events.close()
        if self.wandb:
            self.wandb.finish()


def score(row: dict) -> float:
    """How good an evaluation is: F1 where questions were answered, else minus the loss."""
    loss = row["held_out_loss"]
    return row.get("held_out_f1", -np.inf if loss is None else -loss)


def verdict(steps: list[dict], evaluations: list[dict], keep: str) -> str:
    """The evaluations as a table, beside what training reached meanwhile, and whether it went on for too long."""
    fit = "margin" if "margin" in steps[0] else "loss"
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
