"""Train an adapter and evaluate it, after running every stage before it that is missing or out of date.

    python -m roserag_jax.train --config configs/quickstart.py [--config.section.option=value ...]

Retrieves, evaluates the base model, generates, selects, trains and evaluates the adapter. Writes `checkpoints/`,
`adapter/` (PEFT), `metrics.jsonl`, `tensorboard/` and `report.html` in the workdir, beside what the other stages write.
With `config.train.rounds` of 2 and more, generate, select and train repeat with the adapter of the round before, the
earlier rounds in `rounds/1` and so on. Stopped at any moment, the same command resumes and ends with the same adapter.
"""

import contextlib
import hashlib
import shlex
from importlib.util import find_spec

import jax
from etils import epath

from roserag_jax import automatic_mesh, cli, evaluate, generate, options, rates, retrieve, rounds, select
from roserag_jax.distributed import processes
from roserag_jax.distributed.sharding import devices
from roserag_jax.errors import UserError, first_line
from roserag_jax.hub import loading, peft_adapter
from roserag_jax.preference import labels
from roserag_jax.report.comparison import comparison
from roserag_jax.report.page import write_page
from roserag_jax.report.tables import table
from roserag_jax.report.verdict import verdict
from roserag_jax.session import Session, adapter_digest, checked_adapter
from roserag_jax.training.checkpoints import Checkpoints
from roserag_jax.training.held_out import HeldOut, QuestionAnswering
from roserag_jax.training.log import TrainingLog
from roserag_jax.training.objective import Objective
from roserag_jax.training.pair_loader import Pairs, Stream, hold_out
from roserag_jax.training.train_step import TrainStep, adamw
from roserag_jax.training.trainer import Trainer
from roserag_jax.workdir import ADAPTER, CANDIDATES, PAIRS, RETRIEVED, Recipe, Workdir, is_remote

_NO_INFLUENCE = tuple(
    f"train.{name}"
    for name in "rounds checkpoint_every keep_checkpoints evaluate remat nonfinite profile_steps wandb".split()
)
# What evaluations while training change: which checkpoint is the best, and so the adapter where that is kept.
_EVALUATION = ("train.evaluate_every", "train.answer_questions")


def recipe(session: Session, workdir: Workdir) -> Recipe:
    """What the adapter is made from."""
    config = session.config
    inputs = {PAIRS: workdir.verify(PAIRS)} | session.model_inputs
    if workdir.before is not None:
        inputs["the adapter of the round before"] = adapter_digest(workdir.before)
    elif config.lora.start:
        inputs["config.lora.start"] = adapter_digest(checked_adapter(config.lora.start))
    names = [*Session.model_options, "seed", "lora", "train"]
    without = _NO_INFLUENCE + (_EVALUATION if config.train.keep == "latest" else ())
    found = options.subset(config, *names, without=without)
    if config.train.held_out and config.train.rounds > 1:
        found["train.held_out_of"] = "all questions"  # not of those with pairs, which differ from round to round
    return Recipe(found, inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the adapter up to date."""
    config, train = session.config, session.config.train
    select.make(session, workdir)
    wanted = recipe(session, workdir)
    if workdir.is_up_to_date(ADAPTER, wanted):
        return
    training, held = _pairs(session, workdir)
    stream = Stream(training, batch=train.batch, pad_id=session.pad_id, epochs=train.epochs, seed=config.seed)
    processes.connect(session.mesh)
    step = _train_step(session, stream, workdir.before or config.lora.start)
    _print_plan(session, stream, held, step.accumulate, workdir.label)

    # The same run whichever of its checkpoints is wanted in the end.
    run_options = {k: v for k, v in wanted.options.items() if k not in ("train.keep", *_EVALUATION)}
    fingerprint = Recipe(run_options, wanted.inputs).fingerprint()
    folder = workdir / "checkpoints" / fingerprint
    log = TrainingLog(workdir, folder, wandb=train.wandb, options=config.to_dict())
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(folder, keep=train.keep_checkpoints, options=wanted.options),
        )
        held_out = None
        if held:
            answering = _question_answering(session, workdir, held) if train.answer_questions else None
            best = f"best_{hashlib.sha256(answering.measure.encode()).hexdigest()[:8]}" if answering else "best"
            held_out = HeldOut(
                step,
                Stream(held, batch=train.batch, pad_id=session.pad_id, seed=config.seed),
                log=log,
                best=stack.enter_context(Checkpoints(folder / best, keep=2, options=wanted.options)),
                every=train.evaluate_every,
                question_answering=answering,
            )
        trainer = Trainer(
            step,
            stream,
            checkpoints=checkpoints,
            log=log,
            held_out=held_out,
            checkpoint_every=train.checkpoint_every,
            nonfinite=train.nonfinite,
            profile_steps=train.profile_steps,
            profile_folder=workdir / "profile",
            rate=rates.key(config, "train"),
        )
        state = trainer.fit()
        _print_cut(training, train.max_length)
        if skipped := sum(row.get("skipped", 0) for row in log.steps):
            print(f"{skipped:.0f} of {len(stream)} steps were non-finite (NaN or Inf) and skipped.")
        if held_out:
            print(verdict(log.steps, held_out.evaluations, train.keep))
            if train.keep == "best":
                found = held_out.restore_best(state, trainer.done, checkpoints)
                print(f"The adapter is that of step {found.step}, the best.")
                state = found.state

    files = peft_adapter.adapter_files(
        processes.gather_to_host(state.adapter), session.lora, config.model, config.revision
    )
    if processes.is_main():
        workdir.publish(ADAPTER, wanted, files, len(stream.places))
        for other in folder.parent.iterdir():  # of other options, which this adapter has replaced
            if other.is_dir() and other.name != folder.name:
                other.rmtree()
    processes.barrier("adapter published")


def _pairs(session: Session, workdir: Workdir) -> tuple[Pairs, Pairs]:
    """The pairs to train on and those held out."""
    config, train = session.config, session.config.train
    rows = workdir.row_file(PAIRS, note=lambda row: None)
    pairs = Pairs(session.tokenizer, session.turn_end, rows, train.max_response, train.max_length)
    if lost := pairs.left_out:
        print(f"{lost} of {len(rows)} pairs have a response over {train.max_response} tokens and are left out.")
    if not len(pairs):
        raise UserError(f"config.train.max_response={train.max_response}: every pair has a longer response.")
    every = workdir.row_file(RETRIEVED["train"], lambda row: row["id"]).notes if train.rounds > 1 else None
    training, held = hold_out(pairs.ids, train.held_out, config.seed, every)
    if train.held_out and not held:
        raise UserError(
            f"config.train.held_out={train.held_out}: no question that is held out in all rounds has a pair; raise it."
        )
    if not training:
        raise UserError(f"config.train.held_out={train.held_out}: no pair is left to train on.")
    return pairs.subset(training), pairs.subset(held)


def _print_cut(pairs: Pairs, limit: int) -> None:
    """Print what was done to the pairs that were longer than `config.train.max_length`, of those that were read."""
    if pairs.cut:
        print(f"{len(pairs.cut)} of the pairs read were over {limit} tokens; their passages were cut.")
    if pairs.lost:
        print(f"{len(pairs.lost)} of the pairs read are over {limit} tokens without any passage and were left out.")


def _train_step(session: Session, stream: Stream, start: epath.Path | str) -> TrainStep:
    """The step of this configuration's network, with a new adapter or, where it is named, one to start from."""
    config, train = session.config, session.config.train
    if start:
        adapter = peft_adapter.load_adapter(checked_adapter(start), session.source.config, session.mesh)[1]
    else:
        key = jax.random.key(config.seed)
        adapter = loading.init_adapter(session.source.config, session.lora, session.mesh, key)
    return TrainStep(
        loading.assemble(session.source.config, session.base, session.lora, adapter),
        session.mesh,
        objective=Objective.from_options(train, dropout=session.lora.dropout > 0),
        optimizer=adamw(
            train.learning_rate,
            steps=len(stream),
            warmup=train.warmup,
            weight_decay=train.weight_decay,
            max_gradient_norm=train.clip,
        ),
        accumulate=automatic_mesh.accumulation(config, session.source.config, session.lora, session.mesh),
        seed=config.seed,
        skip_nonfinite=train.nonfinite == "skip",
    )


def _question_answering(session: Session, workdir: Workdir, held: Pairs) -> QuestionAnswering:
    """What answers the first `answer_questions` questions of the held-out pairs."""
    config = session.config
    pairs = filter(None, held)
    prompts = {}
    while len(prompts) < config.train.answer_questions and (pair := next(pairs, None)):
        prompts[pair.id] = list(pair.prompt)
    candidates = workdir.row_file(CANDIDATES, note=lambda row: row["id"])
    rows = [candidates[i] for i, name in enumerate(candidates.notes) if name in prompts]

    def engine_of(adapter):
        return session.engine_of(loading.assemble(session.source.config, session.base, session.lora, adapter))

    return QuestionAnswering(
        engine_of,
        session.tokenizer,
        rows,
        [prompts[row["id"]] for row in rows],
        metric=config.evaluate.metric,
        language=config.data.language,
        answer_line=config.prompt.answer_line,
        slots=config.evaluate.batch or 16,
        max_new_tokens=config.evaluate.max_tokens,
        stop_strings=config.prompt.stop,
    )


def _print_plan(session: Session, stream: Stream, held: Pairs, accumulate: int, label: str) -> None:
    """Print what will be trained, and warn where the mesh does not divide it."""
    train = session.config.train
    each = rates.seconds_each(rates.key(session.config, "train"))
    takes = f"; {rates.about(each * len(stream))} by the rate of an earlier run" if each else ""
    print(
        f"{label}train: {len(stream.places)} pairs, {len(stream)} steps of {train.batch}"
        + (f" in {accumulate} microbatches" if accumulate > 1 else "")
        + f", adapter rank {session.lora.rank}"
        + (f"; {len(held)} pairs held out" if held else "")
        + f"{takes}."
    )
    microbatch, over = train.batch // accumulate, devices("batch", session.mesh)
    if microbatch % over:
        print(
            f"Warning: a microbatch of {microbatch} pairs is not divided by the {over} devices of mesh.data and "
            "mesh.fsdp, so each works on all of them; set config.train.batch to a multiple."
        )


def _check(session: Session, workdir: Workdir) -> None:
    """Refuse now what would fail after hours of sampling.

    Raises:
      UserError: naming the option and what to do.
    """
    config, train = session.config, session.config.train
    _ = session.lora
    if config.adapter:
        raise UserError(
            f"config.adapter={config.adapter!r}: train makes an adapter and evaluates that; leave it empty "
            "(config.lora.start names one that training starts from)."
        )
    labels.check_answer_line(config)
    made_from = ["data.pairs"] if config.data.pairs else ["data.train", "generate.samples", "select.scores"]
    options.require_files(config, *made_from)
    if train.evaluate:
        evaluate.check_questions(config)
    if is_remote(workdir.path) and train.profile_steps:
        raise UserError("config.train.profile_steps: the trace is written to a local workdir only; set it to 0.")
    if train.wandb and find_spec("wandb") is None:
        raise UserError(f"config.train.wandb={train.wandb!r}: wandb is not installed (pip install wandb).")
    if jax.process_count() > 1 and train.answer_questions:
        raise UserError(
            "config.train.answer_questions: several processes train in step and cannot answer meanwhile; set it to 0."
        )


def outlook(config, workdir: Workdir) -> str:
    """What is still to be made, and how long it may take where the rates of earlier runs on this machine are known."""
    rows = {split: (workdir.manifest(name) or {"rows": 0})["rows"] for split, name in RETRIEVED.items()}
    stages = []  # name, amount of work, rate
    evaluation = lambda system: (
        (f"evaluate {system}", rows["eval"], evaluate.rate_key(config, system, config.prompt.passages))
        if config.train.evaluate and workdir.manifest(f"eval/{system}") is None
        else None
    )
    stages.append(evaluation("base"))
    for each in _rounds(config, workdir):
        if not config.data.pairs and each.manifest(CANDIDATES) is None:
            stages.append((f"{each.label}generate", rows["train"], generate.rate_key(config, config.generate)))
        if each.manifest(ADAPTER) is None:
            steps = _most_steps(config, each, rows["train"])
            stages.append((f"{each.label}select and train", steps, rates.key(config, "train")))
    stages = [*filter(None, [*stages, evaluation("adapter")])]
    if not stages:
        return "To do: nothing, unless something is out of date."
    is_training = lambda name: name.endswith("select and train")
    work = [name if is_training(name) else f"{name} ({count} questions)" for name, count, _ in stages]
    known = [(name, count * each) for name, count, rate in stages if count and (each := rates.seconds_each(rate))]
    takes = [f"{name} {'at most ' * is_training(name)}{rates.about(seconds)}" for name, seconds in known]
    if len(known) == len(stages) > 1:
        takes.append(f"together {rates.about(sum(seconds for _, seconds in known))}")
    return f"To do: {', '.join(work)}." + (
        f" By the rates of earlier runs on this machine: {'; '.join(takes)}." if takes else ""
    )


def _most_steps(config, workdir: Workdir, questions: int) -> int:
    """The steps of training if every question gets a pair, or of the pairs that there are; 0 if that says nothing."""
    select, train, pairs = config.select, config.train, workdir.manifest(PAIRS)
    if pairs is None and (config.data.pairs or select.strategy == "all"):
        return 0
    return train.epochs * -(-(pairs["rows"] if pairs else questions) // train.batch)


def _report(workdir: str) -> str:
    """Write the report; returns a line with its place, or why there is none, which must not fail a run that is done."""
    try:
        return f"Report:          {write_page([workdir])} (open it in a browser)"
    except Exception as error:
        why = first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        return f"Warning: no report was written ({why}). To try again: roserag report {shlex.quote(workdir)}"


def _rounds(config, workdir: Workdir) -> list[Workdir]:
    """The workdirs of the rounds, in order."""
    count = config.train.rounds
    return [rounds.workdir_of(workdir, number, count) for number in range(1, count + 1)]


def run(config) -> None:
    """The command."""
    workdir, session = Workdir(config.workdir), Session(config)
    _check(session, workdir)
    with workdir.lock():
        results = {}
        rounds.arrange(workdir, config.train.rounds)
        with processes.main_first():
            retrieve.make(config, workdir, ("train",) * (not config.data.pairs) + ("eval",) * config.train.evaluate)
        print(outlook(config, workdir))
        if config.train.evaluate:
            results["base"] = evaluate.make(session, workdir, "base")
        for each in _rounds(config, workdir):
            make(session, each)
        if config.train.evaluate:
            for number, each in enumerate(_rounds(config, workdir)[:-1], 1):
                name = f"round{number}"
                results[name] = evaluate.make(session, workdir, name, adapter=checked_adapter(each / ADAPTER))
            results["adapter"] = evaluate.make(session, workdir, "adapter")
            print(f"\n{table(*comparison(results))}\n")
        print(f"Adapter (PEFT):  {workdir / ADAPTER}")
        print(f"Pairs:           {workdir / PAIRS}")
        if results:
            print(f"Responses:       {workdir / 'eval/adapter/examples.jsonl'}")
        print(f"Training curve:  {workdir / 'metrics.jsonl'}")
        if processes.is_main():
            print(_report(config.workdir))
        print("Next: roserag_jax.answer --question '...' with a corpus, or roserag_jax.export for a merged model.")


if __name__ == "__main__":
    cli.main(run, __doc__)
