"""The report on confidences: of a workdir whose candidates are drawn from known distributions."""

import json

import numpy as np
import pytest

from roserag_jax.errors import UserError
from roserag_jax.rag import metrics
from roserag_jax.report import confidence
from roserag_jax.workdir import CANDIDATES, PAIRS, RETRIEVED, Recipe, Workdir, to_jsonl

SELECT = {"select.strategy": "hard", "select.confidence": "mean", "select.evidence": 0}


def candidate(rng, answer, surprise):
    tokens = int(rng.integers(5, 30))
    return {
        "response": f"{rng.integers(1 << 40)}\nAnswer: {answer}",
        "rationale": "r",
        "answer": answer,
        "source": "plain",
        "count": 1,
        "correct": answer == "a",
        "logprob": -surprise * tokens,
        "tokens": tokens,
    }


def publish_candidates(folder, right, wrong, questions=150):
    """A workdir with candidates whose surprise is drawn by `right(rng)` and `wrong(rng)`."""
    rng, rows, work = np.random.default_rng(0), [], Workdir(str(folder))
    for number in range(questions):
        made = [candidate(rng, "a", right(rng)) for _ in range(1 + number % 3)]
        made += [candidate(rng, "b", wrong(rng)) for _ in range(1 + number % 4)]
        rows.append({"id": str(number), "prompt": "p", "golden_answers": ["a"], "candidates": made, "dropped": {}})
    work.publish(CANDIDATES, Recipe({"prompt.passages": 1}, {}), to_jsonl(rows), len(rows))
    retrieved = [{"id": row["id"], "question": "q", "golden_answers": ["a"], "contexts": []} for row in rows]
    work.publish(RETRIEVED["train"], Recipe({}, {}), to_jsonl(retrieved), len(rows))
    work.publish(PAIRS, Recipe(SELECT, {}), "", 0)
    return work


def publish_evaluation(work, name, passages, em):
    row = {"golden_answers": ["a"]}
    scores = [metrics.score_row(row, "a" if value else "b", True) for value in em]
    result = {"system": name.partition("-")[0], "passages": passages, "noise": "none", **metrics.summarize(scores)}
    result |= {"prompt_tokens": 9.0, "response_tokens": 9.0, "seconds_per_question": 0.1}
    examples = [{"id": str(i), "scores": each} for i, each in enumerate(scores)]
    files = {"metrics.json": json.dumps(result), "examples.jsonl": to_jsonl(examples)}
    work.publish(f"eval/{name}", Recipe({}, {}), files, len(em))


def findings(work, **options):
    confidence.report(work, work / "confidence", 19, **options)
    content = json.loads((work / "confidence/confidence.json").read_text())
    return content, {finding["name"]: finding for finding in content["findings"]}


@pytest.fixture
def exponential(tmp_path):
    return publish_candidates(tmp_path / "work", lambda rng: rng.exponential(0.5), lambda rng: rng.exponential(0.9))


def test_margins_of_exponential_confidences_are_those_predicted(exponential):
    content, found = findings(exponential)
    for side in ("correct", "incorrect"):
        p = {fit["family"]: fit["p"] for fit in content["fits"][side]}
        assert p["exponential"] > 0.05 >= p["normal"]
    assert [row["strategy"] for row in content["margins"]] == ["hard", "random", "easy"]
    for row in content["margins"]:
        low, high = row["interval"]
        assert low - 0.05 < row["exponential"] < high + 0.05
        assert row["best"] == pytest.approx(row["exponential"], abs=0.15)
    assert {finding["seen"] for finding in found.values()} == {None}  # nothing is evaluated or trained
    assert "<svg" in (exponential / "confidence/quantiles.svg").read_text()


def test_exponential_is_rejected_for_confidences_that_are_not(tmp_path):
    """Surprises far from 0: hard selection's margin is much larger than exponentials of the same means predict."""
    draw = lambda mean: lambda rng: rng.normal(mean, 0.05)
    content, _ = findings(publish_candidates(tmp_path / "work", draw(0.5), draw(0.9)))
    assert all(fit["p"] <= 0.05 for fits in content["fits"].values() for fit in fits if fit["family"] == "exponential")
    hard = content["margins"][0]
    assert hard["interval"][0] > hard["exponential"] + 0.3
    assert hard["best"] == pytest.approx(hard["observed"], abs=0.03)


def test_signs_of_failure_are_seen(exponential):
    """EM falls beyond five passages, the loss falls while EM does not rise, hard pairs come nearer to the others."""
    rng = np.random.default_rng(1)
    at_five = rng.random(200) < 0.6
    for name, passages, em in [
        ("base", 5, at_five),
        ("adapter", 5, at_five),
        ("base-k10", 10, at_five & (rng.random(200) < 0.6)),
        ("adapter-k10", 10, at_five | (rng.random(200) < 0.5)),
    ]:
        publish_evaluation(exponential, name, passages, em)
    (exponential / "metrics.jsonl").write_text(
        to_jsonl({"step": i, "loss": 2.0 - 0.1 * i} for i in range(1, 11))
        + to_jsonl([{"step": 10, "held_out_loss": 1}])
    )
    work = exponential / "confidence"
    content, _ = findings(exponential)
    after = []  # every surprise moves half of the way to 0.7
    questions, _ = confidence.read_questions(exponential)
    for q in questions:
        both = [*q.right, *q.wrong]
        sums = [0.5 * (c["logprob"] - 0.7 * c["tokens"]) for c in both]
        after.append({"logprobs": sums, "tokens": [c["tokens"] for c in both]})
    scores = work / "after.jsonl"
    scores.write_text(to_jsonl(after))
    content, found = findings(exponential, after=str(scores))
    falls = [f for f in content["findings"] if f["name"].startswith("EM falls")]
    assert {f["text"].partition(":")[0]: f["seen"] for f in falls} == {"base": True, "adapter": False}
    assert found["the gap between selected and other pairs narrows"]["seen"]
    assert found["training loss falls while EM is flat"]["seen"]
    scores.write_text(to_jsonl(after[1:]))
    with pytest.raises(UserError, match=r"149 rows for 150 questions"):
        findings(exponential, after=str(scores))


def test_report_without_candidates_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no candidates.jsonl"):
        confidence.report(Workdir(str(tmp_path)), tmp_path, 19)


def test_report_on_few_candidates_still_tells_the_signs_of_failure(tmp_path):
    """What cannot be fitted is said, and not the end; what correct means stands in the first line."""
    work = publish_candidates(tmp_path / "work", lambda rng: rng.exponential(0.5), lambda rng: rng.exponential(0.9), 3)
    text = confidence.report(work, work / "confidence", 19)
    assert "3 questions, 3 of them with both; what is correct is said by the golden answers" in text.splitlines()[0]
    assert "No distribution was fitted: There are 6 correct candidates; 8 are needed" in text
    assert "Signs of failure:" in text and "unknown: EM falls after K = 5" in text
