"""From questions to a trained and evaluated adapter; every stage that is missing or out of date is run first.

    python -m roserag_jax.train --config configs/quickstart.py [--config.section.option=value ...]

Retrieves, evaluates the base model, generates, selects, trains and evaluates the adapter. Writes `checkpoints/`,
`adapter/` (PEFT), `metrics.jsonl` and `tensorboard/` in the workdir, beside what the other stages write. Stopped at any
moment, the same command goes on and ends with the same adapter.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from roserag_jax import config as options
from roserag_jax import evaluate, select
from roserag_jax.errors import UserError
from roserag_jax.models import adapter as adapters
from roserag_jax.models import weights
from roserag_jax.runtime.checkpoints import Checkpoints
from roserag_jax.runtime.loader import Stream, tokenize
from roserag_jax.runtime.progress import Progress
from roserag_jax.runtime.session import Session
from roserag_jax.runtime.train_step import Objective, TrainStep, make_optimizer
from roserag_jax.workdir import Recipe, Workdir, digest, to_lines, write_atomic

ARTIFACT = "adapter"
_NO_INFLUENCE = ("train.checkpoint_every", "train.keep_checkpoints", "train.evaluate", "train.remat")


def recipe(config, workdir: Workdir) -> Recipe:
    """What the adapter is made from."""
    inputs = {"pairs.jsonl": workdir.check(select.ARTIFACT)}
    if config.lora.start:
        inputs["config.lora.start"] = digest(epath.Path(config.lora.start).expanduser())
    names = [*Session.model_options, "seed", "lora", "train"]
    return Recipe(options.subset(config, *names, without=_NO_INFLUENCE), inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the adapter up to date."""
    config, train = session.config, session.config.train
    select.make(session, workdir)
    wanted = recipe(config, workdir)
    if workdir.fresh(ARTIFACT, wanted):
        return
    rows = workdir.rows(select.ARTIFACT)
    pairs, left_out = tokenize(session.tokenizer, session.turn_end, rows, train.max_response)
    if left_out:
        print(f"{left_out} of {len(rows)} pairs have a response over {train.max_response} tokens and are left out.")
    if not pairs:
        raise UserError(f"config.train.max_response={train.max_response}: every response is longer; raise it.")
    stream = Stream(pairs, train.batch, train.epochs, config.seed, session.pad_id)

    adapter = _starting_adapter(session)
    model = weights.assemble(session.source.config, session.base, session.lora, adapter)
    optimizer, schedule = make_optimizer(train.learning_rate, len(stream), train.warmup, train.weight_decay, train.clip)
    named = ("loss", "beta", "gamma", "label_smoothing", "sft_weight", "remat")
    objective = Objective(**{name: train[name] for name in named}, dropout=session.lora.dropout > 0)
    step_function = TrainStep(
        model, session.mesh, objective, optimizer, schedule, train.accumulate, config.seed, stream.shared
    )

    folder = workdir / "checkpoints"
    checkpoints = Checkpoints(folder / wanted.fingerprint(mesh=config.mesh.to_dict()), train.keep_checkpoints)
    done, state = checkpoints.restore(step_function.initial)
    print(f"train: {len(pairs)} pairs, {len(stream)} steps of {train.batch}, adapter rank {session.lora.rank}.")
    with _Log(workdir, done) as log:
        state = _steps(step_function, stream, state, done, checkpoints, log, train)

    workdir.publish(ARTIFACT, wanted, adapters.to_files(state.adapter, session.lora, config.model), len(pairs))
    for old in folder.iterdir():
        if old.name != checkpoints.folder.name:
            old.rmtree()


def _starting_adapter(session: Session):
    """A fresh adapter, or the one that training goes on from."""
    config, start = session.config, session.config.lora.start
    if not start:
        key = jax.random.key(config.seed)
        return weights.init_adapter(session.source.config, session.lora, session.mesh, key)
    return adapters.load(Path(start).expanduser(), session.source.config, session.mesh)[1]


def _steps(step_function, stream, state, done, checkpoints, log, train):
    """Run the steps that are left; save every so often, at the end, and when told to stop."""
    progress = Progress("train", len(stream), "steps", done)
    clock = time.monotonic()
    saved = done
    try:
        for step, batch in enumerate(stream.start(done), done):
            state, metrics = step_function(state, batch, step)
            metrics = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"]):
                raise UserError(
                    f"Step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; rows "
                    f"{', '.join(stream.ids(step))}. The last good checkpoint is of step {saved}. "
                    "Lower config.train.learning_rate or look at those rows."
                )
            done = step + 1
            seconds, clock = time.monotonic() - clock, time.monotonic()
            real = int(len(stream.shared) + batch.prompt_lengths.sum() + batch.response_lengths.sum())
            padded = len(stream.shared) + batch.prompt.size + batch.targets.size
            speed = {"pairs_per_s": float(batch.weights.sum()) / seconds, "tokens_per_s": real / seconds}
            log.write(done, metrics | speed | {"padding_share": 1 - real / padded})
            note = f"loss {metrics['loss']:.3f}"
            if "accuracy" in metrics:
                note += f", chosen over rejected {metrics['margin']:+.2f}"
            progress.update(done, note)
            if done % train.checkpoint_every == 0 and done < len(stream):
                saved = done  # before the call, which ends even if it is told to stop
                checkpoints.save(done, state)
        if done > saved:
            saved = done
            checkpoints.save(done, state)
    except (KeyboardInterrupt, SystemExit):
        # A step that was interrupted has donated its state; only a whole one can be saved.
        if done > saved and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            checkpoints.save(done, state)
            print(f"\nSaved step {done}.")
        raise
    finally:
        checkpoints.close()
    return state


class _Log:
    """`metrics.jsonl` and TensorBoard events, cut back to the step that a resumed run starts from."""

    def __init__(self, workdir: Workdir, done: int):
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if done and self.path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= done]
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=done + 1)

    def __enter__(self):
        return self

    def write(self, step: int, metrics: dict) -> None:
        """Add one step."""
        self.rows.append({"step": step, **{name: round(value, 6) for name, value in metrics.items()}})
        write_atomic(self.path, to_lines(self.rows))
        for name, value in metrics.items():
            self.events.add_scalar(f"train/{name}", value, step)

    def __exit__(self, *_):
        self.events.close()


def run(config) -> None:
    """The command."""
    workdir, session = Workdir(config.workdir), Session(config)
    _ = session.lora  # refused now rather than after an hour of sampling
    with workdir.lock():
        results = {}
        if config.train.evaluate:
            results["base"] = evaluate.make(session, workdir, "base")
        make(session, workdir)
        if config.train.evaluate:
            results["adapter"] = evaluate.make(session, workdir, "adapter")
            print(f"\n{evaluate.comparison(results)}\n")
        print(f"Adapter (PEFT):  {workdir / ARTIFACT}")
        print(f"Pairs:           {workdir / select.ARTIFACT}")
        if results:
            print(f"What was said:   {workdir / 'eval/adapter/examples.jsonl'}")
        print(f"Training curve:  {workdir / 'metrics.jsonl'}")
        print("Next: roserag_jax.answer --question '...', or roserag_jax.export for a merged model.")


if __name__ == "__main__":
    options.main(run, __doc__)
