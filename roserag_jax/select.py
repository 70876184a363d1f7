"""Select the (chosen, rejected) pair of each question.

    python -m roserag_jax.select --config configs/quickstart.py

Reads `candidates.jsonl`, writes `pairs.jsonl`: TRL's `{prompt, chosen, rejected}` plus `{id, chosen_logprob,
rejected_logprob, margin}`. With `config.data.pairs` the pairs are those of a file, and nothing is generated.
"""

from roserag_jax import config as options
from roserag_jax import generate, retrieve
from roserag_jax.preference import selection
from roserag_jax.rag import datasets
from roserag_jax.runtime import processes
from roserag_jax.runtime.session import Session
from roserag_jax.workdir import Recipe, Workdir, to_lines

ARTIFACT = "pairs.jsonl"


def recipe(config, workdir: Workdir) -> Recipe:
    """What the pairs are made from."""
    if config.data.pairs:
        names = ["data.pairs", *Session.model_options]  # the chat template is the tokenizer's
        return Recipe(options.subset(config, *names), retrieve.file_digest(config, "data.pairs"))
    inputs = {"candidates.jsonl": workdir.check(generate.ARTIFACT)}
    names = ["select", "seed"] if config.select.strategy == "random" else ["select"]
    return Recipe(options.subset(config, *names), inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the pairs up to date."""
    config = session.config
    if not config.data.pairs:
        generate.make(session, workdir)
    with processes.main_first():
        _make(session, workdir)


def _make(session: Session, workdir: Workdir) -> None:
    config, wanted = session.config, recipe(session.config, workdir)
    if workdir.fresh(ARTIFACT, wanted):
        return
    if config.data.pairs:
        pairs = datasets.read_pairs(config.data.pairs, session.tokenizer)
        workdir.publish(ARTIFACT, wanted, to_lines(pairs), len(pairs))
        print(f"{ARTIFACT}: {len(pairs)} ready-made pairs\n{selection.lengths(pairs)}")
        return
    rows = workdir.rows(generate.ARTIFACT)
    shown = {
        row["id"]: row.get("contexts", [])[: config.prompt.passages]
        for row in workdir.rows(retrieve.ARTIFACTS["train"])
    }
    pairs, counts = selection.select(rows, shown, config.select, config.seed)
    workdir.publish(ARTIFACT, wanted, to_lines(pairs), len(pairs))
    print(f"{ARTIFACT}: {selection.summary(pairs, rows, counts, config.select.confidence)}")


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        make(Session(config), workdir)
        print(f"Made {workdir / ARTIFACT}. Next: roserag_jax.train.")


if __name__ == "__main__":
    options.main(run, __doc__)
