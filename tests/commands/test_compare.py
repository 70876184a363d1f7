"""`evaluate`: systems side by side over passages and noise, and what it refuses."""

import json
import sys

import pytest

from roserag_jax import evaluate
from roserag_jax.errors import UserError
from roserag_jax.report import comparison
from roserag_jax.workdir import Workdir, digest


def test_evaluate_compares_systems_side_by_side(finished, config_of, tmp_path, capsys, monkeypatch):
    """One call: closed book, base and two adapters at two K and two noises; kept the second time; official files."""
    work = Workdir(finished.workdir)
    renamed = tmp_path / "other.1"
    renamed.mkdir()
    for file in (work / "adapter").iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    changes = {
        "evaluate.systems": ("closed_book", "base", "adapter"),
        "evaluate.adapters": (str(renamed),),
        "evaluate.passages": (1, 2),
        "evaluate.noise": ("none", "counterfactual1"),
        "data.train": finished.data.train,
        "data.eval": finished.data.eval,
    }
    config = config_of(workdir=finished.workdir, **changes)
    before = digest(work / "eval/base")
    monkeypatch.chdir(tmp_path)
    evaluate.run(config)
    out = capsys.readouterr().out
    results = comparison.load(work / "eval")
    names = [f"{s}-k{k}{n}" for s in ("base", "adapter", "other_1") for k in (1, 2) for n in ("", "-counterfactual1")]
    assert set(results) == {"base", "adapter", "closed_book", *names} and digest(work / "eval/base") == before
    for name in (*names, "closed_book"):
        assert f"\n{name} " in out
    for text in ("distraction", "adapter-k1 - base-k1 ", "other_1-k2-counterfactual1 - base-k2-counterfactual1 "):
        assert text in out
    answers_of = lambda name: json.loads((work / f"eval/{name}/predictions.json").read_text())
    assert answers_of("adapter-k2") == answers_of("other_1-k2") and set(answers_of("base")) == {
        "answer",
        "sp",
        "evidence",
    }
    example = json.loads((work / "eval/base-k1-counterfactual1/examples.jsonl").read_text().splitlines()[0])
    assert "Passage 2:" in example["prompt"] and "Passage 3:" not in example["prompt"]
    assert example["response_tokens"] <= 12 and example["prompt_tokens"] > 50
    assert "Passage" not in (work / "eval/closed_book/examples.jsonl").read_text().split('"prompt":')[1]
    assert results["base-k1"]["seconds_per_question"] > 0 and results["base-k1"]["unparsed"] >= 0
    (tmp_path / "unrelated").touch()  # what else lies in the current folder plays no part
    evaluate.run(config)
    assert capsys.readouterr().out.count("up to date: kept") == 2 * 13  # questions and evaluation, each time
    assert "| base-k1 | " in comparison.summary(work / "eval", results, as_markdown=True)
    monkeypatch.setattr(sys, "argv", ["comparison", str(work / "eval"), "--against", "other_1"])
    comparison.main()
    out = capsys.readouterr().out
    assert "adapter-k2 - other_1-k2 " in out and "closed_book - other_1-k1 " in out and " - base" not in out
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "nobody"])
    with pytest.raises(UserError, match="--against nobody: no such system; there are adapter, base, closed_book, oth"):
        comparison.main()
    config.evaluate.passages = (3,)
    with pytest.raises(UserError, match="no question has 3 passages, at most 2"):
        evaluate.run(config)
    config.evaluate.adapters = (str(tmp_path / "base"),)
    with pytest.raises(UserError, match="would be called 'base', which is taken"):
        evaluate.run(config)
    for name in ("base-k5", "x-random3", "base-shuffled", "base-weak", "x-typos10", "x-swapped2", "X-Truncated50"):
        config.evaluate.adapters = (str(tmp_path / name),)
        with pytest.raises(UserError, match=f"would be called '{name}', which is how an evaluation with other"):
            evaluate.run(config)


def test_evaluate_needs_its_adapter(config_of):
    with pytest.raises(UserError, match="adapter is missing"):
        evaluate.run(config_of(**{"evaluate.systems": ("adapter",)}))
