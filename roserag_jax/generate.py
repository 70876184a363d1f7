"""Sample rationales for every training question and verify them.

    python -m roserag_jax.generate --config configs/quickstart.py

Reads `retrieved.jsonl`, writes `candidates.jsonl`: `{id, prompt, golden_answers, candidates: [{response, rationale,
answer, source, correct, logprob, tokens}], dropped}`. Stopped, it goes on after the last finished batch.
"""

from roserag_jax import config as options
from roserag_jax import retrieve
from roserag_jax.preference import candidates
from roserag_jax.rag.prompts import Prompt, PromptBuilder
from roserag_jax.runtime.progress import Progress
from roserag_jax.runtime.session import Session
from roserag_jax.workdir import Parts, Recipe, Workdir, to_lines

ARTIFACT = "candidates.jsonl"


def recipe(config, workdir: Workdir) -> Recipe:
    """What the candidates are made from."""
    names = [*Session.model_options, "seed", "prompt", "generate"]
    inputs = {"retrieved.jsonl": workdir.check(retrieve.ARTIFACTS["train"])}
    return Recipe(options.subset(config, *names, without=("generate.batch",)), inputs)


def batches(prompts: list[Prompt], size: int) -> list[list[int]]:
    """Rows grouped by prompt length: a fixed partition, so that a batch made again gives the same numbers."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tokens), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def filled(prompts: list[Prompt], size: int) -> list[Prompt]:
    """Prompts with empty ones up to the batch size."""
    return prompts + [Prompt("", [], 0)] * (size - len(prompts))


def make(session: Session, workdir: Workdir) -> None:
    """Bring the candidates up to date."""
    config = session.config
    retrieve.make(config, workdir, ("train",))
    wanted = recipe(config, workdir)
    if workdir.fresh(ARTIFACT, wanted):
        return
    rows, size = workdir.rows(retrieve.ARTIFACTS["train"]), config.generate.batch
    builder = PromptBuilder(session.tokenizer, **config.prompt)
    plain, guided = [builder.plain(row) for row in rows], [builder.guided(row) for row in rows]
    if cut := sum(p.cut > 0 for p in plain):
        print(f"{cut} of {len(rows)} prompts were over {config.prompt.max_tokens} tokens; their passages were cut.")
    groups = batches(plain, size)
    parts = Parts(workdir, "generate", wanted.fingerprint(batch=size, mesh=config.mesh.to_dict()))
    count = lambda: sum(len(part) for part in parts.done.values())
    progress = Progress("generate", len(rows), "questions", count())
    if len(parts.done) < len(groups):
        engine, newlines = session.engine(), candidates.newline_tokens(session.tokenizer)
        shared = [engine.read_shared([p.tokens for p in prompts]) for prompts in (plain, guided)]
    for number, group in enumerate(groups):
        if number in parts.done:
            continue
        of_group = lambda items, group=group: [items[i] for i in group]
        made = candidates.generate_batch(
            engine,
            session.tokenizer,
            config.generate,
            of_group(rows),
            filled(of_group(plain), size),
            filled(of_group(guided), size),
            shared,
            newlines,
            progress.phase,
        )
        parts.write(number, made)
        found = [c for part in parts.done.values() for row in part for c in row["candidates"]]
        progress.update(count(), f"{sum(c['correct'] for c in found)} of {len(found)} candidates correct")
    by_id = {row["id"]: row for part in parts.done.values() for row in part}
    results = [by_id[row["id"]] for row in rows]
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
