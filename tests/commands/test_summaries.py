"""Texts that have no short answer: without an answer line, judged by rewards, measured by similarity."""

import contextlib
import io
import json

import pytest
from conftest import write_lines

from roserag_jax import evaluate, generate, train
from roserag_jax.errors import UserError
from roserag_jax.rag import metrics, synthetic
from roserag_jax.report.page import page
from roserag_jax.report.runs import read_run
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.bert_score import BertScore
from roserag_jax.workdir import Workdir

BY_REWARD = {"prompt.answer_line": False, "select.labels": "reward", "select.reward_relative": True}


@pytest.fixture(scope="module")
def summaries(config_of, reward_folder, bert_folder, tmp_path_factory):
    """A finished run on questions whose golden answers are texts, the folder of its encoder, and what it said."""
    folder = tmp_path_factory.mktemp("summaries")
    for split in ("train", "eval"):
        rows = list(synthetic.generate(5, split, passages=2))
        for row in rows:
            row["golden_answers"] = [" ".join(c["text"] for c in row["contexts"])]
        write_lines(folder / f"{split}.jsonl", *rows)
    reward, encoder = reward_folder[0], bert_folder()[0]
    changes = {"select.reward_model": str(reward), "evaluate.similarity": ("rouge_l",), "train.epochs": 1}
    config = config_of(folder / "train.jsonl", **BY_REWARD | changes)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train.run(config)
    return config, encoder, said.getvalue()


def test_train_without_an_answer_line_learns_complete_responses(summaries):
    config, _, said = summaries
    assert " candidates" in said and "candidates correct" not in said  # reference texts are not answers
    work = Workdir(config.workdir)
    rows = work.rows("candidates.jsonl")
    assert all("Answer:" not in row["prompt"] and "relevant passages say" in row["prompt"] for row in rows)
    found = [c for row in rows for c in row["candidates"]]
    assert found and all(c["response"] == c["rationale"] and not c["answer"] for c in found)
    assert all(c["correct"] is None and "\nAnswer:" not in c["response"] for c in found)
    responses = {row["id"]: {c["response"] for c in row["candidates"]} for row in rows}
    pairs = work.rows("pairs.jsonl")
    assert pairs and all({pair["chosen"], pair["rejected"]} <= responses[pair["id"]] for pair in pairs)
    example = json.loads((work / "eval/adapter/examples.jsonl").read_text().splitlines()[0])
    assert example["prediction"] == example["response"].strip() and not example["rationale"]


def test_similarity_is_measured_compared_and_reported(summaries, capsys, monkeypatch):
    """ROUGE-L with the run; BERTScore afterwards, without answering a question again."""
    config, encoder, _ = summaries
    work = Workdir(config.workdir)
    before = (work / "eval/base/examples.jsonl").read_text()
    config.update_from_flattened_dict(
        {"evaluate.similarity": ("rouge_l", "bert_score"), "evaluate.encoder": str(encoder)}
    )
    monkeypatch.setattr(evaluate, "_answer", None)
    evaluate.run(config)
    out = capsys.readouterr().out
    assert "eval/base: its answers are kept and scored anew" in out
    assert "ROUGE-L  [95%]" in out and "BERTScore  [95%]" in out
    tests = [line.split() for line in out.splitlines() if line.startswith("adapter - base")]
    assert [row[3] for row in tests] == ["EM", "F1", "ROUGE-L", "BERTScore"]
    rows = [json.loads(line) for line in (work / "eval/base/examples.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [json.loads(line)["response"] for line in before.splitlines()]
    expected = BertScore(encoder, local_mesh())(
        [row["prediction"] for row in rows], [row["golden_answers"] for row in rows]
    )
    assert [row["scores"]["bert_score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    result = json.loads((work / "eval/base/metrics.json").read_text())
    rouge = [metrics.RougeL()(row["prediction"], row["golden_answers"]) for row in rows]
    assert result["rouge_l"] == pytest.approx(100 * sum(rouge) / len(rouge), abs=0.01)
    assert result["rouge_l_interval"][0] <= result["rouge_l"] <= result["rouge_l_interval"][1]
    text = page([read_run(config.workdir)])
    assert "ROUGE-L  [95%]" in text and "BERTScore with 95% intervals" in text
    config.update_from_flattened_dict({"evaluate.similarity": (), "evaluate.encoder": ""})
    evaluate.run(config)
    assert "rouge_l" not in json.loads((work / "eval/base/metrics.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select.labels": "gold"}, "select.labels='gold' compares short answers.*reward or scores"),
        ({"select.labels": "self_consistency"}, "compares short answers"),
        ({"generate.answer": "sampled"}, "there is no answer; leave it out"),
    ],
)
def test_labels_that_need_an_answer_line_are_refused_without_one(changes, message, config_of):
    of_reward = {"select.reward_model": "x"} if "select.labels" not in changes else {"select.reward_relative": False}
    config = config_of(**BY_REWARD | of_reward | changes)
    with pytest.raises(UserError, match=message):
        generate.run(config)
    with pytest.raises(UserError, match=message):
        train.run(config)
