"""Sample rationales for every training question and verify them.

    python -m roserag_jax.generate --config configs/quickstart.py

Reads `retrieved.jsonl`, writes `candidates.jsonl`: `{id, prompt, prompt_cut, passage_spans, golden_answers, candidates:
[{response, rationale, answer, source, count, correct, logprob, tokens}], dropped}`. When stopped, the same command
resumes with the questions that are not finished. Prompts are built while others are decoded, and several processes take
the questions from one queue.

With `config.select.labels=self_consistency` the plain rationales come first (`votes.jsonl`); the answer that most of
them lead to takes the golden answers' place, in `golden_answers` and in what the guided prompts show.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from roserag_jax import cli, options, rates, retrieve, rounds
from roserag_jax.ahead import in_order
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.inference.requests import DecoderCapacity
from roserag_jax.inference.scheduler import NumberedTask, length_classes, run_tasks
from roserag_jax.inputs import input_digest
from roserag_jax.partial_results import PartialResults
from roserag_jax.preference import candidates, labels
from roserag_jax.preference.candidates import QuestionInputs
from roserag_jax.preference.labels import LABELS, VOTE
from roserag_jax.progress import Progress
from roserag_jax.rag import answers
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.prompts import BUILDERS, PromptBuilder, PromptSize, estimate_lengths
from roserag_jax.report.tables import table
from roserag_jax.session import Session, adapter_digest
from roserag_jax.workdir import CANDIDATES, RETRIEVED, VOTES, ChangedRows, Recipe, RowFile, Workdir, to_json

_NO_INFLUENCE = ("generate.batch", "generate.memory_gb")
_GUIDED = ("generate.guided_samples", "generate.guided_temperature")


def recipe(session: Session, workdir: Workdir) -> Recipe:
    """What the candidates are made from."""
    config = session.config
    names = [*Session.model_options, "seed", "prompt", "generate", "data.language", "evaluate.metric"]
    inputs = {RETRIEVED["train"]: workdir.verify(RETRIEVED["train"])} | session.model_inputs
    if workdir.before is not None:
        inputs["the adapter of the round before"] = adapter_digest(workdir.before)
    if config.generate.samples:
        inputs |= input_digest(config, "generate.samples")
    names += ["select.labels", "select.agreement"] * _votes(config)
    return Recipe(options.subset(config, *names, without=_NO_INFLUENCE), inputs)


def _votes(config) -> bool:
    """Whether the plain candidates vote for the answer that guided prompts show."""
    return LABELS[config.select.labels].hint == VOTE


def fit_to_memory(session: Session, capacity: DecoderCapacity, prompt_length: int) -> DecoderCapacity:
    """The capacity with `config.generate.batch` slots, or as many as the devices hold or `memory_gb` allows.

    Raises:
      UserError: not even one question fits.
    """
    slots = session.slots(session.config.generate.batch, capacity, prompt_length, on_cpu=8)
    capacity = dataclasses.replace(capacity, slots=slots)
    limit = session.config.generate.memory_gb
    if not limit:
        return capacity
    each = capacity.slot_bytes(session.source.config, 4 if session.config.dtype == "float32" else 2, prompt_length)
    fits = int(limit * 1e9 / each)
    if not fits:
        raise UserError(
            f"config.generate.memory_gb={limit}: one question with {capacity.branches} rationales at a time takes "
            f"{each / 1e9:.2f} GB; raise it, or lower config.generate.plain_samples or config.prompt.max_tokens."
        )
    capacity = dataclasses.replace(capacity, slots=min(capacity.slots, fits))
    print(f"generate: {capacity.slots} questions at a time, {each / 1e6:.0f} MB each, of {limit} GB.")
    return capacity


def outside_samples(path: str, known: set[str]) -> dict[str, list[str]]:
    """Responses generated elsewhere, by the id of the question; ids that are not in `known` are ignored.

    Raises:
      UserError: a line is not `{id, samples: [text, ...]}`, or none belongs to a question.
    """
    found, unknown = {}, 0
    for where, line in read_rows(epath.Path(path).expanduser()):
        samples = line.get("samples")
        if "id" not in line or not isinstance(samples, list) or not all(isinstance(s, str) for s in samples):
            raise UserError(f"{where}: an id and a list of texts, samples, are expected.")
        if str(line["id"]) in known:
            found.setdefault(str(line["id"]), []).extend(samples)
        else:
            unknown += 1
    if not found:
        raise UserError(f"config.generate.samples={path}: no id in it is one of the training questions.")
    print(f"{path}: samples for {len(found)} of {len(known)} questions; {unknown} lines for others.")
    return found


class _Note(NamedTuple):
    """What is kept in memory of a question."""

    id: str
    size: PromptSize
    labeled: bool


class Questions:
    """Questions to generate candidates of; the prompts of each are built when it is asked for.

    Args:
      sampling: `config.generate`, or a change of it.

    Attributes:
      order: their numbers, the longest prompts first.
      classes: the length classes of their prompts.
      capacity: what the decoder must have room for.
    """

    def __init__(self, session: Session, rows: RowFile | ChangedRows, builder: PromptBuilder, sampling):
        self.rows, self.builder, self.sampling = rows, builder, sampling
        self.outside = outside_samples(sampling.samples, {n.id for n in rows.notes}) if sampling.samples else {}
        self.shared = {"plain": builder.common_tokens(), "guided": builder.common_tokens(guided=True)}
        self.most_reused = candidates.most_reused(builder)
        sizes = [note.size for note in rows.notes]
        lengths = estimate_lengths(sizes, lambda i: self.build(i).longest, builder.max_tokens)
        self.order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
        most_outside = max(map(len, self.outside.values()), default=0)
        capacity = candidates.decoder_capacity(sampling, self.most_reused, most_outside)
        self.capacity = fit_to_memory(session, capacity, max(lengths))
        self.classes = length_classes(lengths, self.capacity.slots)

    def build(self, i: int) -> QuestionInputs:
        """Build the prompts of a question."""
        row, shared, branches = self.rows[i], len(self.shared["guided"]), self.sampling.guided_samples
        plain = self.builder.plain(row)
        guided = self.builder.guided(row, plain) if branches else plain
        reused = candidates.reusable_tokens(plain, guided, branches, shared, self.most_reused)
        return QuestionInputs(row, plain, guided, reused, self.outside.get(row["id"], []))


def generate_rows(
    session: Session, questions: Questions, numbers: Iterable[int], adapter: epath.Path | None = None
) -> Iterator[dict]:
    """Generate the candidates of the questions with these numbers; yields each row as soon as it is finished.

    Args:
      adapter: of the model that samples and is measured; None is the base model.
    """
    engine, tokenizer = session.decoding_session.engine(adapter), session.tokenizer
    generator = candidates.CandidateGenerator(
        tokenizer,
        questions.sampling,
        shared_prefixes={source: engine.prefill_shared_prefix(tokens) for source, tokens in questions.shared.items()},
        stop_strings=questions.builder.stop,
        answer_line=questions.builder.answer_line,
        measure=_measure(session.config),
    )
    built = in_order(questions.build, numbers, threads=BUILDERS, ahead=questions.capacity.slots)
    tasks = (NumberedTask(number, each.longest, generator.task(each)) for number, each in enumerate(built))
    newlines = candidates.newline_tokens(tokenizer)
    for _, row in run_tasks(engine, tasks, questions.classes, questions.capacity, newlines):
        yield row


def make(session: Session, workdir: Workdir) -> None:
    """Bring the candidates up to date."""
    config = session.config
    labels.check_answer_line(config)
    with processes.main_first():
        retrieve.make(config, workdir, ("train",))
    wanted = recipe(session, workdir)
    if workdir.is_up_to_date(CANDIDATES, wanted):
        return
    builder = PromptBuilder(session.tokenizer, **config.prompt)
    note = lambda row: _Note(row["id"], builder.size(row), bool(row["golden_answers"]))
    rows = workdir.row_file(RETRIEVED["train"], note)
    if _votes(config):
        results, partial = _with_votes(session, workdir, wanted, rows, builder)
    else:
        results, partial = _generate(session, workdir, "generate", wanted, rows, builder, config.generate)
    with processes.main_first():
        if processes.is_main():
            counts: collections.Counter = collections.Counter()
            workdir.publish(CANDIDATES, wanted, _counted(results, counts), len(rows))
            partial.clear()
            if cut := counts["cut", ""]:
                limit = config.prompt.max_tokens
                print(f"{cut} of {len(rows)} prompts were over {limit} tokens; their passages were cut.")
            print(f"{CANDIDATES}: {len(rows)} questions\n{candidates.summary(counts)}")
            if _votes(config):
                made, golden = workdir.rows(CANDIDATES), [row["golden_answers"] for row in rows]
                print(table(*labels.agreement_table(made, golden, _measure(config))))


def _counted(rows: Iterable[dict], counts: collections.Counter) -> Iterator[str]:
    """Rows as JSON lines, and what `candidates.summary` says of them added to `counts`."""
    for row in rows:
        counts.update(candidates.tally(row))
        yield to_json(row)


def rate_key(config, sampling) -> str:
    """What the speed of generating depends on, for `rates`."""
    return rates.key(config, "generate", guided=sampling.guided_samples, plain=sampling.plain_samples)


def _measure(config) -> answers.Measure:
    return answers.Measure(config.evaluate.metric, config.data.language)


def _generate(
    session: Session,
    workdir: Workdir,
    stage: str,
    wanted: Recipe,
    rows: RowFile | ChangedRows,
    builder: PromptBuilder,
    sampling,
) -> tuple[Iterator[dict], PartialResults]:
    """Generate the candidates of all questions, or what a stopped run has left of them.

    Args:
      stage: the name of its partial results, which are the caller's to clear.
      sampling: `config.generate`, or a change of it.
    """
    partial = PartialResults(workdir, stage, wanted.fingerprint(), [note.id for note in rows.notes], candidates.tally)
    progress = Progress(
        stage, len(rows), "questions", len(partial.done), workdir=workdir, rate=rate_key(session.config, sampling)
    )
    questions = Questions(session, rows, builder, sampling) if len(rows) else None
    missing = {*partial.missing()}
    order = [i for i in questions.order if i in missing] if questions else []
    queue = processes.SharedQueue(f"{workdir.label}{stage}", order, questions.capacity.slots if questions else 1)
    if len(queue):
        capacity = questions.capacity
        progress.phase(f"{capacity.slots} questions at a time, {capacity.branches} rationales of each")
        counts = sum(partial.done.values(), collections.Counter())
        known = builder.answer_line and any(note.labeled for note in rows.notes)
        with processes.watched():
            for row in generate_rows(session, questions, queue, workdir.before):
                partial.add(row)
                processes.step()
                counts.update(partial.done[row["id"]])
                correct, found = (candidates.total(counts, what) for what in ("correct", "candidates"))
                note = f"{correct} of {found} candidates correct" if known else f"{found} candidates"
                accepted = [c["rationale"] for c in row["candidates"] if c["correct"]]
                progress.update(len(partial.done), note, accepted[-1] if accepted else "")
    return partial.gather(), partial


def _with_votes(
    session: Session, workdir: Workdir, wanted: Recipe, rows: RowFile, builder: PromptBuilder
) -> tuple[Iterator[dict], PartialResults]:
    """Generate plain candidates, let them vote, and generate guided ones from the answers that win.

    Golden answers play no part: the rows are used without them.
    """
    config, measure = session.config, _measure(session.config)
    unlabeled = rows.changed(
        range(len(rows)), lambda row: row | {"golden_answers": []}, lambda note: note._replace(labeled=False)
    )
    without = ("select.labels", "select.agreement", *_GUIDED)
    of_votes = Recipe({k: v for k, v in wanted.options.items() if k not in without}, wanted.inputs)
    if not workdir.is_up_to_date(VOTES, of_votes):
        plain_only = ConfigDict({**config.generate, "guided_samples": 0})
        voted, partial = _generate(session, workdir, "vote", of_votes, unlabeled, builder, plain_only)
        with processes.main_first():
            if processes.is_main():
                workdir.publish(VOTES, of_votes, map(to_json, voted), len(rows))
                partial.clear()
    votes = workdir.rows(VOTES)
    label = {row["id"]: labels.label_of(labels.vote_of_row(row, measure), config.select.agreement) for row in votes}
    kept = rows.changed(
        [i for i, note in enumerate(rows.notes) if "dropped" not in label[note.id]],
        lambda row: row | {"golden_answers": [label[row["id"]]["answer"]]},
        lambda note: note._replace(labeled=True),
    )
    guided_only = ConfigDict({**config.generate, "plain_samples": 0, "samples": ""})
    guided, partial = _generate(session, workdir, "generate", wanted, kept, builder, guided_only)
    of_row = lambda row: None if "dropped" in label[row["id"]] else next(guided)
    return (labels.join_votes(row, of_row(row), label[row["id"]], measure) for row in votes), partial


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        rounds.arrange(workdir, config.train.rounds)
        first = rounds.workdir_of(workdir, 1, config.train.rounds)
        make(Session(config), first)
        print(f"Wrote {first / CANDIDATES}. Next: roserag_jax.select.")


if __name__ == "__main__":
    cli.main(run, __doc__)
