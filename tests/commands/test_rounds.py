"""Iterated rounds: each samples with the adapter of the one before, stops and resumes, and none is lost."""

import json

import numpy as np
import pytest

from roserag_jax import generate, options, rounds, train
from roserag_jax.errors import UserError
from roserag_jax.partial_results import PartialResults
from roserag_jax.report.page import page
from roserag_jax.report.runs import read_run
from roserag_jax.session import Session, adapter_digest
from roserag_jax.training.pair_loader import Pairs, Stream
from roserag_jax.training.train_step import TrainStep
from roserag_jax.watch import finished_stages
from roserag_jax.workdir import Recipe, Workdir, digest, to_jsonl

TWO_ROUNDS = {"train.rounds": 2, "train.evaluate": False, "generate.batch": 1}


@pytest.fixture(scope="module")
def two_rounds(config_of, questions):
    """A run of two rounds that nothing has stopped."""
    config = config_of(questions, **TWO_ROUNDS)
    train.run(config)
    return config


def test_second_round_samples_and_trains_with_the_adapter_of_the_first(two_rounds):
    """The recipes name that adapter, the same prompts get other candidates, and the first loss is below that before."""
    work = Workdir(two_rounds.workdir)
    first = Workdir(two_rounds.workdir + "/rounds/1")
    assert first.rows("retrieved.jsonl") == work.rows("retrieved.jsonl")
    assert not (first.path / "retrieved.jsonl").exists()
    for name in ("candidates.jsonl", "adapter"):
        inputs = [folder.manifest(name)["inputs"] for folder in (first, work)]
        found = [of.get("the adapter of the round before") for of in inputs]
        assert found == [None, adapter_digest(first / "adapter")]
    rows = [folder.rows("candidates.jsonl") for folder in (first, work)]
    assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
    said = [{(row["id"], c["response"]): c["logprob"] for row in of for c in row["candidates"]} for of in rows]
    both = said[0].keys() & said[1].keys()
    assert said[0].keys() != said[1].keys() and both and all(said[0][key] != said[1][key] for key in both)
    loss = lambda folder: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss(work) < loss(first)
    names = [row["stage"] for row in finished_stages(work)]
    assert names == [f"round {number}: {stage}" for number in (1, 2) for stage in ("generate", "train")]
    text = page([read_run(two_rounds.workdir)])
    assert "<h3>Rounds</h3>" in text and "round 2" in text
    assert read_run(str(first.path)).outcomes


def test_second_round_starts_from_the_adapter_of_the_first_as_peft_does(two_rounds, model_folder):
    """The log-probabilities of its first step are those of transformers with that adapter, not the base model's."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    session, work, options = Session(two_rounds), Workdir(two_rounds.workdir), two_rounds.train
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    # In float64, so that what differs is not torch's order of summation.
    adapted = peft.PeftModel.from_pretrained(base, work / "rounds/1/adapter").eval().double()

    def mean_logprob(prompt, response):
        tokens = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = adapted(tokens).logits[0, len(prompt) - 1 : -1]
        return float(torch.log_softmax(logits, -1).gather(1, tokens[0, len(prompt) :, None]).mean())

    pairs = Pairs(session.tokenizer, session.turn_end, work.rows("pairs.jsonl"), options.max_response)
    stream = Stream(pairs, batch=options.batch, pad_id=session.pad_id, epochs=options.epochs, seed=two_rounds.seed)
    of_step = lambda: np.mean(
        [[mean_logprob(p.prompt, response) for response in (p.chosen, p.rejected)] for p in stream.rows(0)], axis=0
    )
    row = json.loads((work / "metrics.jsonl").read_text().splitlines()[0])
    found = [row["chosen_logprob"], row["rejected_logprob"]]
    assert row["step"] == 1
    np.testing.assert_allclose(found, of_step(), rtol=1e-4)
    with adapted.disable_adapter():
        assert np.abs(found - of_step()).max() > 1e-2


@pytest.mark.parametrize("stage", [pytest.param("generate", marks=pytest.mark.slow), "train"])
def test_run_stopped_in_the_second_round_resumes_to_the_same_adapter(
    stage, two_rounds, config_of, questions, monkeypatch, capsys
):
    config, calls = config_of(questions, **TWO_ROUNDS), []
    work = Workdir(config.workdir)

    def stopping(function):
        def call(self, *arguments, **keywords):
            calls.append((work / "rounds/1/adapter/manifest.json").exists())
            if sum(calls) == 2:  # of the second round
                raise KeyboardInterrupt
            return function(self, *arguments, **keywords)

        return call

    with monkeypatch.context() as patched:
        of, name = {"generate": (PartialResults, "add"), "train": (TrainStep, "__call__")}[stage]
        patched.setattr(of, name, stopping(getattr(of, name)))
        with pytest.raises(KeyboardInterrupt):
            train.run(config)
    assert not (work / "adapter/manifest.json").exists()
    capsys.readouterr()
    train.run(config)
    out = capsys.readouterr()
    assert "adapter is up to date: kept." in out.out
    assert f"round 2: {stage}: resuming at 1 of" in out.err
    for name in ("adapter", "rounds/1/adapter", "candidates.jsonl", "pairs.jsonl"):
        assert digest(work / name) == digest(Workdir(two_rounds.workdir) / name)


@pytest.mark.slow
def test_another_number_of_rounds_keeps_what_is_finished(config_of, questions, capsys):
    """A second round after a run of one builds on it; back to one round, the adapter is the first again."""
    config = config_of(questions, **TWO_ROUNDS | {"train.rounds": 1})
    train.run(config)
    work = Workdir(config.workdir)
    first = {name: digest(work / name) for name in ("adapter", "candidates.jsonl", "checkpoints", "metrics.jsonl")}
    config.train.rounds = 2
    train.run(config)
    assert {name: digest(work / "rounds/1" / name) for name in first} == first
    second = digest(work / "adapter")
    assert second != first["adapter"]
    capsys.readouterr()
    config.train.rounds = 1
    train.run(config)
    assert {name: digest(work / name) for name in first} == first and digest(work / "rounds/2/adapter") == second
    assert "rebuilding" not in capsys.readouterr().out
    config.train.rounds = 2
    generate.run(config)  # the first round's
    assert digest(work / "adapter") == second and rounds.earlier(work) == [1]
    out = capsys.readouterr().out
    assert "rebuilding" not in out and "rounds/1/candidates.jsonl" in out


def publish_round(work, tag):
    """What a round leaves, with a tag in every file."""
    work.publish("candidates.jsonl", Recipe({"tag": tag}, {}), to_jsonl([{"id": tag}]), 1)
    work.publish("adapter", Recipe({"tag": tag}, {}), {"adapter_config.json": tag}, 1)
    for name in ("metrics.jsonl", "checkpoints/f/3/x", ".parts/generate-abc/0000.jsonl"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(tag)


def test_arrange_moves_finished_rounds_to_where_they_belong(tmp_path):
    """Whatever the number of rounds changes to, the run's own workdir is that of the last, and none is lost."""
    run = Workdir(str(tmp_path))
    run.publish("retrieved.jsonl", Recipe({}, {}), "{}\n", 1)
    (tmp_path / ".parts/evaluate-base-x").mkdir(parents=True)
    for number, tag in enumerate(("one", "two", "three"), 1):
        rounds.arrange(run, number)
        assert run.manifest("candidates.jsonl") is None
        publish_round(run, tag)
    first, *_, last = (rounds.workdir_of(run, number, 3) for number in (1, 2, 3))
    assert first.path == run.path / "rounds/1" and first.before is None and first.label == "round 1: "
    assert last.path == run.path and last.before == run.path / "rounds/2/adapter" and last.label == "round 3: "
    assert first.rows("retrieved.jsonl") == [{}] and first / "progress.json" == run / "progress.json"
    assert (tmp_path / ".parts/evaluate-base-x").exists() and not (first / ".parts/evaluate-base-x").exists()
    for count in (1, 2, 3, 2, 1, 3):
        rounds.arrange(run, count)
        assert rounds.earlier(run) == [number for number in (1, 2, 3) if number != count]
        for number, tag in enumerate(("one", "two", "three"), 1):
            work = run if number == count else Workdir(str(tmp_path / f"rounds/{number}"))
            assert work.rows("candidates.jsonl") == [{"id": tag}]
            assert work.is_up_to_date("adapter", Recipe({"tag": tag}, {}))
            assert all((work / name).read_text() == tag for name in ("metrics.jsonl", "checkpoints/f/3/x"))
            assert (work / ".parts/generate-abc/0000.jsonl").read_text() == tag


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.pairs": "pairs.jsonl"}, "those of one round"),
        ({"select.labels": "scores", "select.scores": "x", "generate.guided_samples": 0}, "one round's candidates"),
    ],
)
def test_rounds_of_what_is_made_elsewhere_are_refused(changes, message):
    config = options.defaults()
    config.model = config.workdir = "x"
    config.update_from_flattened_dict({"train.rounds": 2} | changes)
    with pytest.raises(UserError, match=message):
        options.validate(config)
