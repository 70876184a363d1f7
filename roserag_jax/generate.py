"""Sample rationales for every training question and verify them.

    python -m roserag_jax.generate --config configs/quickstart.py

Reads `retrieved.jsonl`, writes `candidates.jsonl`: `{id, prompt, passage_spans, golden_answers, candidates: [{response,
rationale, answer, source, correct, logprob, tokens}], dropped}`. When stopped, the same command resumes with the
questions that are not finished.
"""

from etils import epath

from roserag_jax import cli, options, retrieve
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.inference import decoder
from roserag_jax.inference.decoder import Room
from roserag_jax.inference.engine import shared_length
from roserag_jax.preference import candidates
from roserag_jax.progress import Progress
from roserag_jax.rag.files import read_rows
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.session import Session
from roserag_jax.workdir import PartialResults, Recipe, Workdir, to_jsonl

ARTIFACT = "candidates.jsonl"


def recipe(config, workdir: Workdir) -> Recipe:
    """What the candidates are made from."""
    names = [*Session.model_options, "seed", "prompt", "generate"]
    inputs = {"retrieved.jsonl": workdir.verify(retrieve.ARTIFACTS["train"])}
    if config.generate.samples:
        inputs |= retrieve.file_digest(config, "generate.samples")
    return Recipe(options.subset(config, *names, without=("generate.batch", "generate.memory_gb")), inputs)


def fitting(session: Session, room: Room, prompt: int) -> Room:
    """Room for `config.generate.batch` questions, or for what `memory_gb` allows if that is less.

    Raises:
      UserError: not even one question fits.
    """
    limit = session.config.generate.memory_gb
    if not limit:
        return room
    each = room.memory(session.source.config, 4 if session.config.dtype == "float32" else 2, prompt)
    fits = int(limit * 1e9 / each)
    if not fits:
        raise UserError(
            f"config.generate.memory_gb={limit}: one question with {room.branches} rationales at a time takes "
            f"{each / 1e9:.2f} GB; raise it, or lower config.generate.plain_samples or config.prompt.max_tokens."
        )
    room = room._replace(tasks=min(room.tasks, fits))
    print(f"generate: {room.tasks} questions at a time, {each / 1e6:.0f} MB each, of {limit} GB.")
    return room


def outside_samples(path: str, rows: list[dict]) -> list[list[str]]:
    """Responses made elsewhere, as many for each row ('' fills up); ids of no training question are ignored.

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
    most = max(len(found.get(row["id"], [])) for row in rows)
    return [[*found.get(row["id"], []), *[""] * (most - len(found.get(row["id"], [])))] for row in rows]


def make(session: Session, workdir: Workdir) -> None:
    """Bring the candidates up to date."""
    config = session.config
    with processes.main_first():
        retrieve.make(config, workdir, ("train",))
    wanted = recipe(config, workdir)
    if workdir.is_up_to_date(ARTIFACT, wanted):
        return
    rows = workdir.rows(retrieve.ARTIFACTS["train"])
    builder = PromptBuilder(session.tokenizer, **config.prompt)
    plain, guided = [builder.plain(row) for row in rows], [builder.guided(row) for row in rows]
    if cut := sum(p.cut > 0 for p in plain):
        print(f"{cut} of {len(rows)} prompts were over {config.prompt.max_tokens} tokens; their passages were cut.")
    outside = outside_samples(config.generate.samples, rows) if config.generate.samples else [[] for _ in rows]
    sampling, read_once = config.generate, shared_length([g.tokens for g in guided])
    hints = [candidates.hint_behind(*of, sampling.guided_samples, read_once) for of in zip(plain, guided, strict=True)]
    apart = [g.tokens if hint is None else [] for g, hint in zip(guided, hints, strict=True)]  # read by themselves
    lengths = [max(len(p.tokens), len(tokens)) for p, tokens in zip(plain, apart, strict=True)]
    room = fitting(session, candidates.room(sampling, len(outside[0]), guided, hints), max(lengths))
    parts = PartialResults(workdir, "generate", wanted.fingerprint(), [row["id"] for row in rows])
    missing = parts.missing()
    progress = Progress("generate", len(parts.done) + len(missing), "questions", len(parts.done))
    if missing:
        engine, newlines = session.own.engine(), candidates.newline_tokens(session.tokenizer)
        shared = tuple(engine.read_shared(prompts) for prompts in ([p.tokens for p in plain], [*filter(None, apart)]))
        progress.phase(f"{room.tasks} questions at a time, {room.branches} rationales of each")
        of_row = lambda i: (rows[i], plain[i], guided[i], hints[i], outside[i])
        task = lambda i: candidates.question(session.tokenizer, sampling, *of_row(i), shared, builder.stop)
        found = [candidates.correct(row) for row in parts.done.values()]
        correct, of = sum(c for c, _ in found), sum(n for _, n in found)
        for _, made in decoder.run(engine, {i: task(i) for i in missing}, lengths, room, newlines):
            parts.add(made)
            here, made_here = candidates.correct(made)
            correct, of = correct + here, of + made_here
            progress.update(len(parts.done), f"{correct} of {of} candidates correct")
    results = parts.gather()
    with processes.main_first():
        if processes.is_main():
            workdir.publish(ARTIFACT, wanted, to_jsonl(results), len(results))
            parts.clear()
            print(f"{ARTIFACT}: {len(results)} questions\n{candidates.summary(results)}")


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        make(Session(config), workdir)
        print(f"Wrote {workdir / ARTIFACT}. Next: roserag_jax.select.")


if __name__ == "__main__":
    cli.main(run, __doc__)
