"""Select the (chosen, rejected) pair of each question.

    python -m roserag_jax.select --config configs/quickstart.py

Reads `candidates.jsonl`, writes `pairs.jsonl`: TRL's `{prompt, chosen, rejected}` plus `{id, passage_spans,
chosen_logprob, rejected_logprob, margin}`. With `config.data.pairs` the pairs are those of a file, and nothing
is generated. `config.select.labels` says what tells right candidates from wrong ones: golden answers, what most samples
agree on, a reward model (its rewards go to `rewards.jsonl`) or a file of scores.
"""

import jax

from roserag_jax import cli, generate, options, rounds
from roserag_jax.distributed import processes
from roserag_jax.hub import model_files, tokenizer
from roserag_jax.hub.reward_model import RewardModelFolder
from roserag_jax.inputs import input_digest
from roserag_jax.partial_results import PartialResults
from roserag_jax.preference import labels, pairs, rewards, selection
from roserag_jax.preference.rewards import RewardModel
from roserag_jax.progress import Progress
from roserag_jax.rag import answers
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.session import Session
from roserag_jax.workdir import CANDIDATES, PAIRS, RETRIEVED, REWARDS, Recipe, Workdir, to_json


def recipe(session: Session, workdir: Workdir) -> Recipe:
    """What the pairs are made from."""
    config = session.config
    if config.data.pairs:
        names = [
            "data.pairs",
            "data.train_rows",
            "prompt.template_arguments",
            *Session.model_options,
        ]  # the chat template is the tokenizer's
        return Recipe(options.subset(config, *names), input_digest(config, "data.pairs") | session.model_inputs)
    inputs = {CANDIDATES: workdir.verify(CANDIDATES)}
    if config.select.labels == "reward":
        inputs[REWARDS] = workdir.verify(REWARDS)
    if config.select.labels == "scores":
        inputs |= input_digest(config, "select.scores")
    names = ["select", "data.language", "evaluate.metric"] + ["seed"] * (config.select.strategy == "random")
    return Recipe(options.subset(config, *names), inputs)


def make(session: Session, workdir: Workdir) -> None:
    """Bring the pairs up to date."""
    config = session.config
    if not config.data.pairs:
        generate.make(session, workdir)
        if config.select.labels == "reward":
            _make_rewards(session, workdir)
    with processes.main_first():
        _make(session, workdir)


def _make_rewards(session: Session, workdir: Workdir) -> None:
    """Bring the candidates' rewards up to date."""
    config, name = session.config, session.config.select.reward_model
    path = model_files.resolve_path(name)
    inputs = {CANDIDATES: workdir.verify(CANDIDATES), RETRIEVED["train"]: workdir.verify(RETRIEVED["train"])}
    inputs["config.select.reward_model"] = model_files.fingerprint(name)
    wanted = Recipe(options.subset(config, "select.reward_model", "dtype", "prompt"), inputs)
    if workdir.is_up_to_date(REWARDS, wanted):
        return
    rows, questions = workdir.rows(CANDIDATES), {row["id"]: row for row in workdir.rows(RETRIEVED["train"])}
    partial = PartialResults(workdir, "reward", wanted.fingerprint(), [row["id"] for row in rows])
    progress = Progress("reward", len(rows), "questions", len(partial.done), workdir=workdir)
    # Each process has its share of what process 0 finds missing.
    missing = processes.gather(f"{workdir.label}rewards missing", partial.missing() if processes.is_main() else None)[0]
    if missing := missing[jax.process_index() :: jax.process_count()]:
        # Its own tokenizer and chat template, and no demonstrations, which only show what a response looks like.
        builder = PromptBuilder(tokenizer.load_tokenizer(name), **{**config.prompt, "examples": 0})
        mesh = session.decoding_session.mesh
        model = RewardModel(RewardModelFolder(path), builder.tokenizer, session.dtype, mesh)
        responses = lambda row: [c["response"] for c in row["candidates"]]
        mine, most = [rows[i] for i in missing], max(len(row["candidates"]) for row in rows)
        texts = (builder.conversations(questions[row["id"]], responses(row)) for row in mine)
        groups = [[*map(model.tokens, of_question)] for of_question in texts]
        with processes.watched():
            for number, found in model.rewards(groups, config.evaluate.batch or 16, most):
                partial.add({"id": mine[number]["id"], "rewards": found})
                processes.step()
                progress.update(len(partial.done))
    results = partial.gather()
    with processes.main_first():
        if processes.is_main():
            workdir.publish(REWARDS, wanted, map(to_json, results), len(rows))
            partial.clear()


def _make(session: Session, workdir: Workdir) -> None:
    config, wanted = session.config, recipe(session, workdir)
    if workdir.is_up_to_date(PAIRS, wanted):
        return
    if config.data.pairs:
        rows = pairs.read_pairs(
            config.data.pairs, session.tokenizer, config.prompt.template_arguments, config.data.train_rows
        )
        workdir.publish_rows(PAIRS, wanted, rows)
        print(f"{PAIRS}: {len(rows)} ready-made pairs\n{selection.lengths(rows)}")
        return
    rows = rewards.joined(config.select, workdir, workdir.rows(CANDIDATES))
    shown = {row["id"]: row.get("contexts", [])[: config.prompt.passages] for row in workdir.rows(RETRIEVED["train"])}
    measure = answers.Measure(config.evaluate.metric, config.data.language)
    if not labels.LABELS[config.select.labels].hint:
        print(labels.reward_summary(rows, config.select, measure))
    made, counts = selection.select(rows, shown, config.select, config.seed, measure)
    workdir.publish_rows(PAIRS, wanted, made)
    print(f"{PAIRS}: {selection.summary(made, rows, counts, config.select.confidence)}")


def run(config) -> None:
    """The command."""
    workdir = Workdir(config.workdir)
    with workdir.lock():
        rounds.arrange(workdir, config.train.rounds)
        first = rounds.workdir_of(workdir, 1, config.train.rounds)
        make(Session(config), first)
        print(f"Wrote {first / PAIRS}. Next: roserag_jax.train.")


if __name__ == "__main__":
    cli.main(run, __doc__)
