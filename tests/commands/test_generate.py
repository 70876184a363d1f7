"""`generate`: candidates from samples of the model and from elsewhere."""

import json
import re
import socket
import subprocess

import pytest
from conftest import command_line, copy_folder
from safetensors.numpy import load_file, save_file

from roserag_jax import generate, session
from roserag_jax.errors import UserError
from roserag_jax.partial_results import PartialResults
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.workdir import Workdir


def test_generate_verifies_samples_from_elsewhere(finished, config_of, questions, tmp_path, capsys):
    """Responses in a file are verified as our own are, in batches that fit a memory limit, with the same result."""
    made = Workdir(finished.workdir).rows("candidates.jsonl")
    file, ours = tmp_path / "samples.jsonl", [row for row in made if row["candidates"]]
    lines = [{"id": row["id"], "samples": [c["response"] for c in row["candidates"]]} for row in ours]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "other", "samples": ["x"]}]))
    changes = {"generate.plain_samples": 0, "generate.samples": str(file), "generate.memory_gb": 0.0005}
    config = config_of(questions, **changes)
    generate.run(config)
    out = capsys.readouterr().out
    assert f"samples for {len(ours)} of {len(made)} questions; 1 lines for others" in out
    assert re.search(r"generate: [12] questions at a time, \d+ MB each, of 0.0005 GB", out)
    for row, found in zip(made, Workdir(config.workdir).rows("candidates.jsonl"), strict=True):
        assert {c["source"] for c in found["candidates"]} <= {"outside"}
        by_rationale = {c["rationale"]: c for c in row["candidates"]}
        assert len(found["candidates"]) >= len(by_rationale) - 1  # a parsed answer may leave two rationales the same
        for candidate in found["candidates"]:
            same = by_rationale[candidate["rationale"]]
            assert candidate["answer"] == same["answer"] and candidate["correct"] == same["correct"]
            assert candidate["logprob"] == pytest.approx(same["logprob"], abs=1e-3)

    config.generate.memory_gb = 1e-6
    with pytest.raises(UserError, match="one question with"):
        generate.make(session.Session(config), Workdir(config_of(questions, **changes).workdir))
    config.generate.samples = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="There is no file"):
        generate.run(config)


def test_generate_with_other_weights_behind_the_same_path_makes_every_row_anew(
    config_of, questions, model_folder, tmp_path, monkeypatch, capsys
):
    """Stopped half way and started again after one number of one norm was changed: no row is the former model's."""
    folder = copy_folder(model_folder, tmp_path / "model")
    config, alone = (config_of(questions, model=str(folder)) for _ in range(2))
    add = PartialResults.add

    def stop_behind_the_second_row(partial, row):
        add(partial, row)
        if len(partial.done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "add", stop_behind_the_second_row)
        with pytest.raises(KeyboardInterrupt):
            generate.run(config)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] *= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    generate.run(config)
    assert "resuming" not in "".join(capsys.readouterr())
    generate.run(alone)
    rows = lambda config: Workdir(config.workdir).rows("candidates.jsonl")
    for row, expected in zip(rows(config), rows(alone), strict=True):
        assert [c["response"] for c in row["candidates"]] == [c["response"] for c in expected["candidates"]]
        for candidate, other in zip(row["candidates"], expected["candidates"], strict=True):
            assert candidate["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
    tensors["model.layers.1.input_layernorm.weight"][3] /= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    generate.run(config)
    assert (
        f"candidates.jsonl is out of date (config.model={folder} has changed): rebuilding." in capsys.readouterr().out
    )
    assert [c["logprob"] for c in rows(config)[0]["candidates"]] != [c["logprob"] for c in rows(alone)[0]["candidates"]]


def test_generate_judges_sampled_answers(config_of, questions, tmp_path):
    """`generate.answer=sampled`: a sample's own answer line is right or wrong, and the whole response is scored."""
    texts = ["Passage 1 says so.\nAnswer: red", "Passage 1 says so.\nAnswer: blue", "Nobody knows."]
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({"id": json.loads(questions.read_text().splitlines()[0])["id"], "samples": texts}))
    config = config_of(
        questions, **{"generate.plain_samples": 0, "generate.samples": str(file), "generate.answer": "sampled"}
    )
    generate.run(config)
    row = Workdir(config.workdir).rows("candidates.jsonl")[0]
    assert [(c["response"], c["answer"]) for c in row["candidates"]] == [(texts[0], "red"), (texts[1], "blue")]
    assert row["dropped"] == {"no answer": 1} and row["candidates"][0]["tokens"] == len(texts[0])
    run = session.Session(config)
    prompt, engine = list(run.tokenizer(row["prompt"]).input_ids), run.engine()
    sums = engine.score(engine.prefill([prompt]), [prompt], [[list(run.tokenizer(t).input_ids) for t in texts]], 48)
    for candidate, logprob in zip(row["candidates"], sums[0].sum(-1), strict=False):
        assert candidate["logprob"] == pytest.approx(float(logprob), abs=1e-3)


@pytest.mark.slow
def test_generate_without_golden_answers_lets_the_samples_vote(config_of, questions, tmp_path, capsys):
    """Without golden answers: the same candidates as with golden answers that equal the votes."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    unlabeled, voted = tmp_path / "train.jsonl", tmp_path / "voted.jsonl"
    unlabeled.write_text("".join(json.dumps(r | {"golden_answers": []}) + "\n" for r in rows))
    changes = {"select.labels": "self_consistency", "select.agreement": 0.3, "train.evaluate": False}
    changes |= {"generate.plain_samples": 3, "generate.guided_samples": 2}
    samples = tmp_path / "samples.jsonl"  # three times the same, so that there are majorities
    texts = lambda row: [f"The {row['question']}"] * 3
    samples.write_text("".join(json.dumps({"id": row["id"], "samples": texts(row)}) + "\n" for row in rows))
    changes |= {"generate.samples": str(samples)}

    config = config_of(unlabeled, **changes)
    generate.run(config)
    assert "agreement" in capsys.readouterr().out
    made = Workdir(config.workdir).rows("candidates.jsonl")
    kept = {row["id"]: row for row in made if row["golden_answers"]}
    assert kept and all(row["label"]["votes"] >= 0.3 * row["label"]["samples"] == 0.3 * 6 for row in kept.values())
    for row in made:
        if row["id"] not in kept:
            assert row["label"]["dropped"] and all(c["correct"] is None for c in row["candidates"])

    answers = {i: row["golden_answers"] for i, row in kept.items()}
    voted.write_text("".join(json.dumps(r | {"golden_answers": answers.get(r["id"], ["?"])}) + "\n" for r in rows))
    gold = config_of(voted, **changes | {"select.labels": "gold", "select.agreement": 0.5})
    generate.run(gold)
    judged = lambda row: {(c["source"], c["response"], c["correct"]) for c in row["candidates"]}
    for row in Workdir(gold.workdir).rows("candidates.jsonl"):
        if row["id"] in kept:
            assert judged(row) == judged(kept[row["id"]])
    assert {c["source"] for row in kept.values() for c in row["candidates"]} >= {"guided", "plain"}

    config.select.agreement = 0.9  # the votes stand; only what is made from them is rebuilt
    capsys.readouterr()
    generate.run(config)
    out = capsys.readouterr().out
    assert "votes.jsonl is up to date" in out and "config.select.agreement was 0.3, now 0.9" in out
    config.select.labels, config.select.agreement = "gold", 0.5
    with pytest.raises(UserError, match="no answer; golden_answers must be a list"):
        generate.run(config)


def test_generate_builds_prompts_when_slots_are_free(config_of, monkeypatch):
    """Of 400 questions, the prompts of a few are built before the first is finished, and only those."""
    config, built, build = config_of(), [], PromptBuilder.plain
    config.data.train_rows, config.generate.batch = 400, 2

    def add(partial, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(PromptBuilder, "plain", lambda self, row: built.append(row) or build(self, row))
    monkeypatch.setattr(PartialResults, "add", add)
    with pytest.raises(KeyboardInterrupt):
        generate.run(config)
    assert 2 < len(built) < 40


@pytest.mark.slow
def test_generate_in_several_processes_gives_the_texts_of_one(config_of, tmp_path):
    """One, two and four processes take the questions from a shared queue; who takes which changes no text."""
    texts = {}
    for count in (1, 2, 4):
        config = config_of()
        config.data.train_rows = 9
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for i in range(count):
            together = [f"--config.distributed=localhost:{port},{count},{i}"] if count > 1 else []
            line = command_line("generate", config, *together, file=str(tmp_path / f"{count}-{i}.py"))
            started.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for process in started:
            output = process.communicate(timeout=600)[0]
            assert process.returncode == 0, output
        rows = Workdir(config.workdir).rows("candidates.jsonl")
        texts[count] = [(row["id"], [c["response"] for c in row["candidates"]]) for row in rows]
    assert len(texts[1]) == 9 and texts[2] == texts[1] and texts[4] == texts[1]
