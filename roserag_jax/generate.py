"""Sample rationales for every training question and verify them.

    python -m roserag_jax.generate --config configs/quickstart.py

Reads `retrieved.jsonl`, writes `candidates.jsonl`: `{id, prompt, passage_spans, golden_answers, candidates: [{response,
rationale, answer, source, count, correct, logprob, tokens}], dropped}`. When stopped, the same command resumes with the
questions that are not finished.

With `config.select.labels=self_consistency` the plain rationales come first (`votes.jsonl`); the answer that most of
them lead to takes the golden answers' place, in `golden_answers` and in what the guided prompts show.
"""

import dataclasses
from collections.abc import Iterator

from etils import epath
from ml_collections import ConfigDict

from roserag_jax import cli, options, rates, retrieve
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.inference.engine import shared_prefix_length
from roserag_jax.inference.requests import DecoderCapacity
from roserag_jax.inference.scheduler import run_tasks
from roserag_jax.inputs import input_digest
from roserag_jax.preference import candidates, labels
from roserag_jax.preference.candidates import QuestionInputs
from roserag_jax.preference.labels import LABELS, VOTE
from roserag_jax.progress import Progress
from roserag_jax.rag import answers
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.report.tables import table
from roserag_jax.session import Session
from roserag_jax.workdir import CANDIDATES, RETRIEVED, VOTES, PartialResults, Recipe, Workdir, to_jsonl

_NO_INFLUENCE = ("generate.batch", "generate.memory_gb")
_GUIDED = ("generate.guided_samples", "generate.guided_temperature")


def recipe(session: Session, workdir: Workdir) -> Recipe:
    """What the candidates are made from."""
    config = session.config
    names = [*Session.model_options, "seed", "prompt", "generate", "data.language", "evaluate.metric"]
    inputs = {RETRIEVED["train"]: workdir.verify(RETRIEVED["train"])} | session.model_inputs
    if config.generate.samples:
        inputs |= input_digest(config, "generate.samples")
    names += ["select.labels", "select.agreement"] * _votes(config)
    return Recipe(options.subset(config, *names, without=_NO_INFLUENCE), inputs)


def _votes(config) -> bool:
    """Whether the plain candidates vote for the answer that guided prompts show."""
    return LABELS[config.select.labels].hint == VOTE


def fit_to_memory(session: Session, capacity: DecoderCapacity, prompt_length: int) -> DecoderCapacity:
    """The capacity with as many slots as `memory_gb` allows, at most `config.generate.batch`.

    Raises:
      UserError: not even one question fits.
    """
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


def outside_samples(path: str, rows: list[dict]) -> list[list[str]]:
    """Responses generated elsewhere, by row; ids that are not training questions are ignored.

    Raises:
      UserError: a line is not `{id, samples: [text, ...]}`, or none belongs to a question.
    """
    found, unknown = {}, 0
    known = {row["id"] for row in rows}
    for where, line in read_rows(epath.Path(path).expanduser()):
        samples = line.get("samples")
        if "id" not in line or not isinstance(samples, list) or not all(isinstance(s, str) for s in samples):
            raise UserError(f"{where}: an id and a list of texts, samples, are expected.")
        unknown += str(line["id"]) not in known
        found.setdefault(str(line["id"]), []).extend(samples)
    if not known & found.keys():
        raise UserError(f"config.generate.samples={path}: no id in it is one of the training questions.")
    print(f"{path}: samples for {len(known & found.keys())} of {len(rows)} questions; {unknown} lines for others.")
    return [found.get(row["id"], []) for row in rows]


def question_inputs(session: Session, builder: PromptBuilder, rows: list[dict], sampling) -> list[QuestionInputs]:
    """Build the prompts of every question, and add the responses to it that were generated elsewhere.

    Args:
      sampling: `config.generate`, or a change of it.
    """
    config = session.config
    plain = [builder.plain(row) for row in rows]
    guided = [builder.guided(row) for row in rows] if sampling.guided_samples else plain
    if cut := sum(p.cut > 0 for p in plain):
        print(f"{cut} of {len(rows)} prompts were over {config.prompt.max_tokens} tokens; their passages were cut.")
    outside = outside_samples(sampling.samples, rows) if sampling.samples else [[] for _ in rows]
    shared = shared_prefix_length([g.tokens for g in guided])
    reused = [
        candidates.reusable_tokens(*of, sampling.guided_samples, shared) for of in zip(plain, guided, strict=True)
    ]
    return [QuestionInputs(*of) for of in zip(rows, plain, guided, reused, outside, strict=True)]


def generate_rows(
    session: Session,
    builder: PromptBuilder,
    questions: list[QuestionInputs],
    capacity: DecoderCapacity,
    missing: list[int],
    sampling,
) -> Iterator[dict]:
    """Generate the candidates of the questions numbered in `missing`; yields each row as soon as it is finished."""
    engine, tokenizer = session.decoding_session.engine(), session.tokenizer
    plain = [q.plain.tokens for q in questions]
    guided = [q.guided.tokens if q.reused is None else [] for q in questions]  # those that are prefilled
    generator = candidates.CandidateGenerator(
        tokenizer,
        sampling,
        shared_prefixes={
            "plain": engine.prefill_shared_prefix(plain),
            "guided": engine.prefill_shared_prefix([*filter(None, guided)]),
        },
        stop_strings=builder.stop,
        measure=_measure(session.config),
    )
    tasks = {i: generator.task(questions[i]) for i in missing}
    lengths = [max(map(len, of)) for of in zip(plain, guided, strict=True)]
    for _, row in run_tasks(engine, tasks, lengths, capacity, candidates.newline_tokens(tokenizer)):
        yield row


def make(session: Session, workdir: Workdir) -> None:
    """Bring the candidates up to date."""
    config = session.config
    with processes.main_first():
        retrieve.make(config, workdir, ("train",))
    wanted = recipe(session, workdir)
    if workdir.is_up_to_date(CANDIDATES, wanted):
        return
    rows = workdir.rows(RETRIEVED["train"])
    if _votes(config):
        results, partial = _with_votes(session, workdir, wanted, rows)
    else:
        results, partial = _generate(session, workdir, "generate", wanted, rows, config.generate)
    with processes.main_first():
        if processes.is_main():
            workdir.publish(CANDIDATES, wanted, to_jsonl(results), len(results))
            partial.clear()
            print(f"{CANDIDATES}: {len(results)} questions\n{candidates.summary(results)}")
            if _votes(config):
                print(table(*labels.agreement_table(results, [r["golden_answers"] for r in rows], _measure(config))))


def rate_key(config, sampling) -> str:
    """What the speed of generating depends on, for `rates`."""
    return rates.key(config, "generate", guided=sampling.guided_samples, plain=sampling.plain_samples)


def _measure(config) -> answers.Measure:
    return answers.Measure(config.evaluate.metric, config.data.language)


def _generate(
    session: Session, workdir: Workdir, stage: str, wanted: Recipe, rows: list[dict], sampling
) -> tuple[list[dict], PartialResults]:
    """Generate the candidates of all questions, or what a stopped run has left of them.

    Args:
      stage: the name of its partial results, which are the caller's to clear.
      sampling: `config.generate`, or a change of it.
    """
    builder = PromptBuilder(session.tokenizer, **session.config.prompt)
    partial = PartialResults(workdir, stage, wanted.fingerprint(), [row["id"] for row in rows])
    questions = question_inputs(session, builder, rows, sampling) if rows else []
    missing = partial.missing()
    progress = Progress(
        stage,
        len(partial.done) + len(missing),
        "questions",
        len(partial.done),
        workdir=workdir,
        rate=rate_key(session.config, sampling),
    )
    if missing:
        longest = max(max(len(q.plain.tokens), len(q.guided.tokens) if q.reused is None else 0) for q in questions)
        capacity = fit_to_memory(session, candidates.decoder_capacity(sampling, questions), longest)
        progress.phase(f"{capacity.slots} questions at a time, {capacity.branches} rationales of each")
        counts = [candidates.count_correct(row) for row in partial.done.values()]
        correct, total = sum(c for c, _ in counts), sum(n for _, n in counts)
        known = any(row["golden_answers"] for row in rows)
        with processes.watched():
            for row in generate_rows(session, builder, questions, capacity, missing, sampling):
                partial.add(row)
                processes.step()
                correct_here, total_here = candidates.count_correct(row)
                correct, total = correct + correct_here, total + total_here
                note = f"{correct} of {total} candidates correct" if known else f"{total} candidates"
                accepted = [c["rationale"] for c in row["candidates"] if c["correct"]]
                progress.update(len(partial.done), note, accepted[-1] if accepted else "")
    return partial.gather(), partial


def _with_votes(
    session: Session, workdir: Workdir, wanted: Recipe, rows: list[dict]
) -> tuple[list[dict], PartialResults]:
    """Generate plain candidates, let them vote, and generate guided ones from the answers that win.

    Golden answers play no part: the rows are used without them.
    """
    config, measure = session.config, _measure(session.config)
    unlabeled = [row | {"golden_answers": []} for row in rows]
    without = ("select.labels", "select.agreement", *_GUIDED)
    of_votes = Recipe({k: v for k, v in wanted.options.items() if k not in without}, wanted.inputs)
    if not workdir.is_up_to_date(VOTES, of_votes):
        plain_only = ConfigDict({**config.generate, "guided_samples": 0})
        voted, partial = _generate(session, workdir, "vote", of_votes, unlabeled, plain_only)
        with processes.main_first():
            if processes.is_main():
                workdir.publish(VOTES, of_votes, to_jsonl(voted), len(voted))
                partial.clear()
    votes = workdir.rows(VOTES)
    label = {row["id"]: labels.label_of(labels.vote_of_row(row, measure), config.select.agreement) for row in votes}
    kept = [row | {"golden_answers": [label[row["id"]]["answer"]]} for row in rows if "dropped" not in label[row["id"]]]
    guided_only = ConfigDict({**config.generate, "plain_samples": 0, "samples": ""})
    made, partial = _generate(session, workdir, "generate", wanted, kept, guided_only)
    guided = {row["id"]: row for row in made}
    joined = [labels.join_votes(row, guided.get(row["id"]), label[row["id"]], measure) for row in votes]
    return joined, partial


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        make(Session(config), workdir)
        print(f"Wrote {workdir / CANDIDATES}. Next: roserag_jax.select.")


if __name__ == "__main__":
    cli.main(run, __doc__)
