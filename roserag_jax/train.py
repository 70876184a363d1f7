"""From questions to a trained and evaluated adapter; every stage that is missing or out of date is run first.

    python -m roserag_jax.train --config configs/quickstart.py [--config.section.option=value ...]

Retrieves, evaluates the base model, generates, selects, trains and evaluates the adapter. Writes `checkpoints/`,
`adapter/` (PEFT), `metrics.jsonl` and `tensorboard/` in the workdir, beside what the other stages write. Stopped at any
moment, the same command goes on and ends with the same adapter.
"""

import collections
import sys
import time
from importlib.util import find_spec

import jax
import numpy as np

from roserag_jax import cli, evaluate, options, select
from roserag_jax.distributed import processes
from roserag_jax.distributed.mesh import matmul_rate
from roserag_jax.distributed.sharding import devices
from roserag_jax.errors import UserError
from roserag_jax.hub import loading, peft_adapter
from roserag_jax.inference.respond import respond
from roserag_jax.progress import Progress
from roserag_jax.rag import answers, metrics
from roserag_jax.report.comparison import comparison
from roserag_jax.session import Session, adapter_digest, checked_adapter
from roserag_jax.training.checkpoints import Checkpoints, signals_deferred
from roserag_jax.training.log import TrainingLog, score, verdict
from roserag_jax.training.objective import Objective
from roserag_jax.training.pair_loader import Pair, Stream, hold_out, tokenize
from roserag_jax.training.train_step import TrainState, TrainStep, adamw
from roserag_jax.workdir import ADAPTER, CANDIDATES, PAIRS, Recipe, Workdir, is_remote

_NO_INFLUENCE = tuple(
    f"train.{name}" for name in "checkpoint_every keep_checkpoints evaluate remat nonfinite profile_steps wandb".split()
)
# What evaluations while training change: which checkpoint is the best, and so the adapter where that is kept.
_EVALUATION = ("train.evaluate_every", "train.answer_questions")


def recipe(session: Session, workdir: Workdir) -> Recipe:
    """What the adapter is made from."""
    config = session.config
    inputs = {PAIRS: workdir.verify(PAIRS)} | session.model_inputs
    if config.lora.start:
        inputs["config.lora.start"] = adapter_digest(checked_adapter(config.lora.start))
    names = [*Session.model_options, "seed", "lora", "train"]
    without = _NO_INFLUENCE + (_EVALUATION if config.train.keep == "latest" else ())
    return Recipe(options.subset(config, *names, without=without), inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the adapter up to date."""
    config, train = session.config, session.config.train
    select.make(session, workdir)
    wanted = recipe(session, workdir)
    if workdir.is_up_to_date(ADAPTER, wanted):
        return
    training, held = _pairs(session, workdir)
    stream = Stream(training, batch=train.batch, pad_id=session.pad_id, epochs=train.epochs, seed=config.seed)

    session.free_decoding_session()
    adapter = _starting_adapter(session)
    model = loading.assemble(session.source.config, session.base, session.lora, adapter)
    step_function = TrainStep(
        model,
        session.mesh,
        objective=Objective.from_options(train, dropout=session.lora.dropout > 0),
        optimizer=adamw(
            train.learning_rate,
            steps=len(stream),
            warmup=train.warmup,
            weight_decay=train.weight_decay,
            max_gradient_norm=train.clip,
        ),
        accumulate=train.accumulate,
        seed=config.seed,
        shared_prefix=stream.shared_prefix,
        skip_nonfinite=train.nonfinite == "skip",
    )

    folder = workdir / "checkpoints"
    # The same run whichever of its checkpoints is wanted in the end.
    same = Recipe({k: v for k, v in wanted.options.items() if k not in ("train.keep", *_EVALUATION)}, wanted.inputs)
    here = folder / same.fingerprint(mesh=config.mesh.to_dict())
    checkpoints = Checkpoints(here, train.keep_checkpoints, wanted.options)
    best = Checkpoints(here / "best", 1, wanted.options) if held else None
    done, state = checkpoints.restore(step_function.init())
    padding, shapes = stream.padding()
    print(
        f"train: {len(training)} pairs, {len(stream)} steps of {train.batch}, {padding:.0%} padding, {shapes} shapes, "
        f"adapter rank {session.lora.rank}" + (f"; {len(held)} pairs held out." if held else ".")
    )
    part, over = train.batch // train.accumulate, devices("batch", session.mesh)
    if part % over:
        print(
            f"Warning: the {part} pairs of a step's part are not divided by the {over} devices of mesh.data and "
            "mesh.fsdp, so each works on all of them; set config.train.batch to a multiple."
        )
    with TrainingLog(workdir, here, done, config) as log:
        held_out = _HeldOut(session, workdir, step_function, held, best, log) if held else None
        with processes.shared_preemption():
            state = _steps(step_function, stream, state, done, checkpoints, log, held_out, train, workdir / "profile")
        log.summarize()
        if held_out:
            state = held_out.finish(state, train.keep)

    files = peft_adapter.adapter_files(
        processes.gather_to_host(state.adapter), session.lora, config.model, config.revision
    )
    if processes.is_main():
        workdir.publish(ADAPTER, wanted, files, len(training))
        for old in folder.iterdir():
            if old.name != here.name:
                old.rmtree()
    processes.barrier("adapter published")


def _pairs(session: Session, workdir: Workdir) -> tuple[list[Pair], list[Pair]]:
    """The pairs as tokens, to train on and held out."""
    config, train = session.config, session.config.train
    rows = workdir.rows(PAIRS)
    pairs, counts = tokenize(session.tokenizer, session.turn_end, rows, train.max_response, train.max_length)
    if lost := counts["response too long"]:
        print(f"{lost} of {len(rows)} pairs have a response over {train.max_response} tokens and are left out.")
    if cut := counts["cut"]:
        print(f"{cut} of {len(rows)} pairs were over {train.max_length} tokens; their passages were cut.")
    if lost := counts["prompt too long"]:
        print(f"{lost} of {len(rows)} pairs are over {train.max_length} tokens without any passage and are left out.")
    if not pairs:
        raise UserError(
            f"config.train.max_response={train.max_response}, max_length={train.max_length}: every pair is longer."
        )
    training, held = hold_out(pairs, train.held_out, config.seed)
    if not training:
        raise UserError(f"config.train.held_out={train.held_out}: no pair is left to train on.")
    return training, held


def _starting_adapter(session: Session):
    """A fresh adapter, or the one that training goes on from."""
    config, start = session.config, session.config.lora.start
    if not start:
        key = jax.random.key(config.seed)
        return loading.init_adapter(session.source.config, session.lora, session.mesh, key)
    return peft_adapter.load_adapter(checked_adapter(start), session.source.config, session.mesh)[1]


def _steps(step_function, stream, state, done, checkpoints, log, held_out, train, profile):
    """Run the steps that are left; evaluate and save every so often, at the end, and save when told to stop."""
    progress = Progress("train", len(stream), "steps", done)
    rate = matmul_rate(step_function.mesh, jax.tree.leaves(step_function.base)[0].dtype)
    traced = range(done + 2, min(done + 2 + train.profile_steps, len(stream)))
    saved = done

    def save():
        nonlocal saved
        log.save()
        saved = done  # before the call, which ends even if it is told to stop
        checkpoints.save(done, state)

    try:
        if held_out and held_out.due(done, len(stream)):
            held_out.evaluate(done, state)
        clock = time.monotonic()
        for step, batch in enumerate(stream.start(done), done):
            with signals_deferred():  # a signal between a step and its row would save the one without the other
                if traced and step == traced[0]:
                    jax.profiler.start_trace(str(profile))
                state, metrics = step_function(state, batch, step)
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if traced and step == traced[-1]:
                    jax.profiler.stop_trace()
                    print(f"Trace of {len(traced)} steps: {profile} (TensorBoard's profile plugin shows it).")
                bad = _refuse_nonfinite(metrics, step, stream, saved, train.nonfinite)
                done = step + 1
                seconds, clock = time.monotonic() - clock, time.monotonic()
                metrics |= _rates(step_function, stream, batch, seconds, rate)
                if train.nonfinite == "skip":
                    metrics["skipped"] = float(bad)
                log.write(done, metrics)
                note = f"loss {metrics['loss']:.3f}"
                if "accuracy" in metrics:
                    note += f", chosen over rejected {metrics['margin']:+.2f}"
                progress.update(done, note)
            if held_out and held_out.due(done, len(stream)):
                held_out.evaluate(done, state)
                clock = time.monotonic()
            if processes.preempted():
                save()
                print(f"\nSaved step {done}.")
                sys.exit(143)
            if done % train.checkpoint_every == 0 and done < len(stream):
                save()
        if done > saved:
            save()
    except (KeyboardInterrupt, SystemExit):
        if done > saved and jax.process_count() == 1:  # several processes would have to save together
            save()
            print(f"\nSaved step {done}.")
        raise
    finally:
        checkpoints.close()
        if held_out:
            held_out.best.close()
    return state


def _refuse_nonfinite(metrics: dict, step: int, stream, saved: int, action: str) -> bool:
    """Whether the loss or the gradient of a step is no number; says so, or with `action` 'stop' raises UserError."""
    if metrics.pop("finite"):
        return False
    what = (
        f"Step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; rows "
        f"{', '.join(pair.id for pair in stream.rows(step))}."
    )
    if action == "stop":
        raise UserError(
            f"{what} The last good checkpoint is of step {saved}. Lower config.train.learning_rate, look at those "
            "rows, or set config.train.nonfinite='skip'."
        )
    print(f"{what} Skipped: the adapter is as before.")
    return True


def _rates(step_function, stream, batch, seconds: float, rate: float) -> dict:
    """How fast a step was, `rate` operations per second being what the devices can do, and how much of it padding."""
    real, padded = stream.tokens(batch)
    result = {
        "pairs_per_s": float(batch.weights.sum()) / seconds,
        "tokens_per_s": real / seconds,
        "padding_fraction": 1 - real / padded,
        "mfu": step_function.flops(batch) / seconds / rate,
    }
    memory = jax.local_devices()[0].memory_stats()  # none on a CPU
    if memory and "peak_bytes_in_use" in memory:
        result["peak_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
    return result


class _HeldOut:
    """Evaluation while training: the loss on held-out pairs and, if asked for, answers to their questions.

    The best checkpoint so far is kept: by F1 where questions are answered, else by the held-out loss.
    """

    def __init__(self, session, workdir, step_function, pairs, best: Checkpoints, log):
        self.session, self.step_function, self.best, self.log = session, step_function, best, log
        train = session.config.train
        self.every = train.evaluate_every
        self.stream = Stream(pairs, batch=train.batch, pad_id=session.pad_id, seed=session.config.seed)
        asked = {pair.id: pair.prompt for pair in pairs}
        asked = dict(list(asked.items())[: train.answer_questions])
        golden = workdir.rows(CANDIDATES) if asked else []
        self.questions = [(row, asked[row["id"]]) for row in golden if row["id"] in asked]

    def due(self, step: int, last: int) -> bool:
        """Whether an evaluation belongs at this step and has not been made."""
        return (step % self.every == 0 or step == last) and all(row["step"] != step for row in self.log.evaluations)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluate, log it, and keep the state if it is the best so far."""
        totals, count = collections.Counter(), 0.0
        for number in range(len(self.stream)):
            batch = self.stream.collate(number)
            metrics = self.step_function.evaluate(state.adapter, batch, self.stream.shared_prefix)
            count += (here := float(batch.weights.sum()))
            for name, value in metrics.items():
                totals[name] += here * float(value)
        result = {f"held_out_{name}": total / count for name, total in totals.items()}
        if self.questions:
            result |= self._answers(state)
        before = max(map(score, self.log.evaluations), default=-np.inf)
        if score(row := self.log.write(step, result)) > before:
            self.best.save(step, state)
        seen = [f"{name} {row[f'held_out_{name}']}" for name in ("loss", "em", "f1") if f"held_out_{name}" in row]
        print(f"Step {step}, held out: {', '.join(seen)}.")

    def _answers(self, state) -> dict:
        """EM and F1, in percent, of greedy answers."""
        session, config = self.session, self.session.config
        model = loading.assemble(session.source.config, session.base, session.lora, state.adapter)
        engine = session.engine_of(model)
        rows, prompts = zip(*self.questions, strict=True)
        responses = respond(
            engine,
            session.tokenizer,
            list(prompts),
            slots=config.evaluate.batch,
            max_new_tokens=config.evaluate.max_tokens,
            stop_strings=config.prompt.stop,
        )
        scores, measure = [], answers.Measure(config.evaluate.metric, config.data.language)
        for response in responses:
            _, *answer = answers.parse(response.text)
            scores.append(metrics.score_row(rows[response.number], *answer, measure))
        return {f"held_out_{name}": 100 * np.mean([s[name] for s in scores]) for name in ("em", "f1")}

    def finish(self, state: TrainState, keep: str) -> TrainState:
        """Show what the evaluations say, and return the state that becomes the adapter."""
        print(verdict(self.log.rows, self.log.evaluations, keep))
        if keep == "latest":
            return state
        best = Checkpoints(self.best.folder, 1)
        step, found = best.restore(state)
        best.close()
        print("No best checkpoint is sound." if found is state else f"The adapter is that of step {step}, the best.")
        return found


def run(config) -> None:
    """The command."""
    workdir, session = Workdir(config.workdir), Session(config)
    _ = session.lora  # refused now rather than after an hour of sampling
    if config.adapter:
        raise UserError(
            f"config.adapter={config.adapter!r}: train makes an adapter and evaluates that; leave it empty "
            "(config.lora.start names one that training goes on from)."
        )
    options.require_files(config, *(["data.pairs"] if config.data.pairs else ["data.train", "generate.samples"]))
    if config.train.evaluate:
        evaluate.check_questions(config)
    if is_remote(workdir.path) and config.train.profile_steps:
        raise UserError("config.train.profile_steps: the trace is written to a local workdir only; set it to 0.")
    if config.train.wandb and find_spec("wandb") is None:
        raise UserError(f"config.train.wandb={config.train.wandb!r}: wandb is not installed (pip install wandb).")
    if jax.process_count() > 1 and config.train.answer_questions:
        raise UserError(
            "config.train.answer_questions: several processes train in step and cannot answer meanwhile; set it to 0."
        )
    with workdir.lock():
        results = {}
        if config.train.evaluate:
            results["base"] = evaluate.make(session, workdir, "base")
        make(session, workdir)
        if config.train.evaluate:
            results["adapter"] = evaluate.make(session, workdir, "adapter")
            print(f"\n{comparison(results)}\n")
        print(f"Adapter (PEFT):  {workdir / ADAPTER}")
        print(f"Pairs:           {workdir / PAIRS}")
        if results:
            print(f"What was said:   {workdir / 'eval/adapter/examples.jsonl'}")
        print(f"Training curve:  {workdir / 'metrics.jsonl'}")
        print("Next: roserag_jax.answer --question '...' with a corpus, or roserag_jax.export for a merged model.")


if __name__ == "__main__":
    cli.main(run, __doc__)
