"""Select the (chosen, rejected) pair of each question.

    python -m roserag_jax.select --config configs/quickstart.py

Reads `candidates.jsonl`, writes `pairs.jsonl`: TRL's `{prompt, chosen, rejected}` plus `{id, passage_spans,
chosen_logprob, rejected_logprob, margin}`. With `config.data.pairs` the pairs are those of a file, and nothing
is generated.
"""

from roserag_jax import cli, generate, options
from roserag_jax.distributed import processes
from roserag_jax.inputs import input_digest
from roserag_jax.preference import pairs, selection
from roserag_jax.rag import answers
from roserag_jax.session import Session
from roserag_jax.workdir import CANDIDATES, PAIRS, RETRIEVED, Recipe, Workdir, to_jsonl


def recipe(session: Session, workdir: Workdir) -> Recipe:
    """What the pairs are made from."""
    config = session.config
    if config.data.pairs:
        names = [
            "data.pairs",
            "prompt.template_arguments",
            *Session.model_options,
        ]  # the chat template is the tokenizer's
        return Recipe(options.subset(config, *names), input_digest(config, "data.pairs") | session.model_inputs)
    inputs = {CANDIDATES: workdir.verify(CANDIDATES)}
    names = ["select", "data.language", "evaluate.metric"] + ["seed"] * (config.select.strategy == "random")
    return Recipe(options.subset(config, *names), inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the pairs up to date."""
    config = session.config
    if not config.data.pairs:
        generate.make(session, workdir)
    with processes.main_first():
        _make(session, workdir)


def _make(session: Session, workdir: Workdir) -> None:
    config, wanted = session.config, recipe(session, workdir)
    if workdir.is_up_to_date(PAIRS, wanted):
        return
    if config.data.pairs:
        rows = pairs.read_pairs(config.data.pairs, session.tokenizer, config.prompt.template_arguments)
        workdir.publish(PAIRS, wanted, to_jsonl(rows), len(rows))
        print(f"{PAIRS}: {len(rows)} ready-made pairs\n{selection.lengths(rows)}")
        return
    rows = workdir.rows(CANDIDATES)
    shown = {row["id"]: row.get("contexts", [])[: config.prompt.passages] for row in workdir.rows(RETRIEVED["train"])}
    measure = answers.Measure(config.evaluate.metric, config.data.language)
    made, counts = selection.select(rows, shown, config.select, config.seed, measure)
    workdir.publish(PAIRS, wanted, to_jsonl(made), len(made))
    print(f"{PAIRS}: {selection.summary(made, rows, counts, config.select.confidence)}")


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        make(Session(config), workdir)
        print(f"Wrote {workdir / PAIRS}. Next: roserag_jax.train.")


if __name__ == "__main__":
    cli.main(run, __doc__)
