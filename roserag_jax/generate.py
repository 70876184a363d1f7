"""Sample rationales for every training question and verify them.

    python -m roserag_jax.generate --config configs/quickstart.py

Reads `retrieved.jsonl`, writes `candidates.jsonl`: `{id, prompt, golden_answers, candidates: [{response, rationale,
answer, source, correct, logprob, tokens}], dropped}`. Stopped, it goes on after the last finished batch.
"""

from etils import epath

from roserag_jax import config as options
from roserag_jax import retrieve
from roserag_jax.errors import UserError
from roserag_jax.preference import candidates
from roserag_jax.rag.datasets import read_rows
from roserag_jax.rag.prompts import Prompt, PromptBuilder
from roserag_jax.runtime import processes
from roserag_jax.runtime.progress import Progress
from roserag_jax.runtime.sampler import bucket, decoding_bytes
from roserag_jax.runtime.session import Session
from roserag_jax.workdir import Parts, Recipe, Workdir, to_lines

ARTIFACT = "candidates.jsonl"


def recipe(config, workdir: Workdir) -> Recipe:
    """What the candidates are made from."""
    names = [*Session.model_options, "seed", "prompt", "generate"]
    inputs = {"retrieved.jsonl": workdir.check(retrieve.ARTIFACTS["train"])}
    if config.generate.samples:
        inputs |= retrieve.file_digest(config, "generate.samples")
    return Recipe(options.subset(config, *names, without=("generate.batch", "generate.memory_gb")), inputs)


def batches(prompts: list[Prompt], size: int) -> list[list[int]]:
    """Rows grouped by prompt length: a fixed partition, so that a batch made again gives the same numbers."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tokens), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def fitting_batch(session: Session, prompts: list[Prompt], branches: int) -> int:
    """The batch size: `config.generate.batch`, or what `memory_gb` allows if that is less.

    Raises:
      UserError: not even one question fits.
    """
    options = session.config.generate
    if not options.memory_gb:
        return options.batch
    longest = bucket(max(len(p.tokens) for p in prompts))
    slots = bucket(options.max_tokens + 8) + options.answer_tokens
    itemsize = 4 if session.config.dtype == "float32" else 2
    each = decoding_bytes(session.source.config, itemsize, longest, branches, slots)
    fits = int(options.memory_gb * 1e9 / each)
    if not fits:
        raise UserError(
            f"config.generate.memory_gb={options.memory_gb}: one question with {branches} rationales takes "
            f"{each / 1e9:.2f} GB; raise it, or lower config.generate.plain_samples or config.prompt.max_tokens."
        )
    size = min(options.batch, fits)
    print(f"generate: {size} questions at a time, {each / 1e6:.0f} MB each, of {options.memory_gb} GB.")
    return size


def outside_samples(path: str, rows: list[dict]) -> list[list[str]]:
    """Responses made elsewhere, as many for each row ('' fills up); ids that are no training question are passed over.

    Raises:
      UserError: a line is not `{id, samples: [text, ...]}`, or none belongs to a question.
    """
    found, strange = {}, 0
    known = {row["id"] for row in rows}
    for where, line in read_rows(epath.Path(path).expanduser()):
        samples = line.get("samples")
        if "id" not in line or not isinstance(samples, list) or not all(isinstance(s, str) for s in samples):
            raise UserError(f"{where}: an id and a list of texts, samples, are expected.")
        strange += str(line["id"]) not in known
        found.setdefault(str(line["id"]), []).extend(samples)
    if not known & found.keys():
        raise UserError(f"config.generate.samples={path}: no id in it is one of the training questions.")
    print(f"{path}: samples for {len(known & found.keys())} of {len(rows)} questions; {strange} lines for others.")
    most = max(len(found.get(row["id"], [])) for row in rows)
    return [[*found.get(row["id"], []), *[""] * (most - len(found.get(row["id"], [])))] for row in rows]


def filled(prompts: list[Prompt], size: int) -> list[Prompt]:
    """Prompts with empty ones up to the batch size."""
    return prompts + [Prompt("", [], 0)] * (size - len(prompts))


def make(session: Session, workdir: Workdir) -> None:
    """Bring the candidates up to date."""
    config = session.config
    with processes.main_first("retrieved"):
        retrieve.make(config, workdir, ("train",))
    wanted = recipe(config, workdir)
    if workdir.fresh(ARTIFACT, wanted):
        return
    rows = workdir.rows(retrieve.ARTIFACTS["train"])
    builder = PromptBuilder(session.tokenizer, **config.prompt)
    plain, guided = [builder.plain(row) for row in rows], [builder.guided(row) for row in rows]
    if cut := sum(p.cut > 0 for p in plain):
        print(f"{cut} of {len(rows)} prompts were over {config.prompt.max_tokens} tokens; their passages were cut.")
    outside = outside_samples(config.generate.samples, rows) if config.generate.samples else [[] for _ in rows]
    size = fitting_batch(session, guided, candidates.branches(config.generate, outside))
    groups = batches(plain, size)
    layout = wanted.fingerprint(batch=size, mesh=dict(session.own.mesh.shape))
    parts = Parts(workdir, "generate", layout, len(groups))
    progress = Progress("generate", len(rows), "questions", len(parts.rows()))
    if missing := parts.missing():
        engine, newlines = session.own.engine(), candidates.newline_tokens(session.tokenizer)
        shared = [engine.read_shared([p.tokens for p in prompts]) for prompts in (plain, guided)]
    for number in missing:
        of_group = lambda items, group=groups[number]: [items[i] for i in group]
        made = candidates.generate_batch(
            engine,
            session.tokenizer,
            config.generate,
            of_group(rows),
            filled(of_group(plain), size),
            filled(of_group(guided), size),
            of_group(outside),
            shared,
            newlines,
            progress.phase,
        )
        parts.write(number, made)
        found = [c for row in parts.rows() for c in row["candidates"]]
        correct = f"{sum(c['correct'] for c in found)} of {len(found)} candidates correct"
        progress.update(len(parts.rows()), correct)
    results = parts.gather(rows)
    with processes.main_first("candidates published"):
        if processes.is_main():
            workdir.publish(ARTIFACT, wanted, to_lines(results), len(results))
            parts.clear()
            print(f"{ARTIFACT}: {len(results)} questions\n{candidates.summary(results)}")


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        make(Session(config), workdir)
        print(f"Made {workdir / ARTIFACT}. Next: roserag_jax.select.")


if __name__ == "__main__":
    options.main(run, __doc__)
