"""`select` as a command: what becomes out of date, and a run without any pair."""

import pytest

from roserag_jax import select
from roserag_jax.errors import UserError
from roserag_jax.hub.tokenizer import load_tokenizer
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.workdir import Workdir, to_jsonl


def test_select_rebuilds_only_what_depends_on_an_option(finished, config_of, questions, capsys):
    again = config_of(questions, finished.workdir, **{"select.confidence": "sum", "generate.batch": 3})
    capsys.readouterr()
    select.run(again)
    out = capsys.readouterr().out
    assert "candidates.jsonl is up to date" in out
    assert "pairs.jsonl is out of date (config.select.confidence was 'mean', now 'sum')" in out
    select.run(finished)
    assert "now 'mean'" in capsys.readouterr().out


def test_select_without_any_pair_is_an_error(config_of):
    with pytest.raises(UserError, match=r"No pair survived selection: of 6 questions .*none correct"):
        select.run(config_of())


def test_select_by_rewards(finished, config_of, questions, reward_folder, tmp_path, capsys):
    """A reward model's rewards are transformers'; a file of the same scores selects the same pairs."""
    import torch

    folder, theirs = reward_folder
    changes = {"select.labels": "reward", "select.reward_model": str(folder), "select.reward_relative": True}
    config, work = config_of(questions, finished.workdir, **changes), Workdir(finished.workdir)
    select.run(config)
    out = capsys.readouterr().out
    assert "candidates.jsonl is up to date" in out and "rewards: quartiles" in out and "have a golden answer" in out
    rows, rewards = work.rows("candidates.jsonl"), [row["rewards"] for row in work.rows("rewards.jsonl")]
    shown = {row["id"]: row for row in work.rows("retrieved.jsonl")}
    tokenizer = load_tokenizer(str(folder))
    builder = PromptBuilder(tokenizer, **config.prompt)
    row, found = next((row, found) for row, found in zip(rows, rewards, strict=True) if len(found) > 1)
    texts = builder.conversations(shown[row["id"]], [c["response"] for c in row["candidates"]])
    for text, reward in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([tokenizer(text).input_ids])).logits[0, 0].item()
        assert reward == pytest.approx(expected, abs=1e-4)

    pairs = work.rows("pairs.jsonl")
    scores = tmp_path / "scores.jsonl"
    lines = [
        {"id": row["id"], "candidate": c["response"], "score": reward}
        for row, of_row in zip(rows, rewards, strict=True)
        for c, reward in zip(row["candidates"], of_row, strict=True)
    ]
    reward_of = {(line["id"], line["candidate"]): line["score"] for line in lines}
    assert pairs and all(reward_of[p["id"], p["chosen"]] > reward_of[p["id"], p["rejected"]] for p in pairs)
    scores.write_text(to_jsonl(lines))
    changes = {"select.labels": "scores", "select.scores": str(scores), "select.reward_relative": True}
    select.run(config_of(questions, finished.workdir, **changes))
    assert work.rows("pairs.jsonl") == pairs
    select.run(finished)
