"""The synthetic benchmark: its questions can be answered, its splits share nothing, its noise is as stated."""

import re

import pytest

from roserag_jax.rag import synthetic


def test_synthetic_questions_are_answered_by_their_gold():
    rows = list(synthetic.generate(200, "train", passages=6, counterfactual=0.5))
    assert rows == list(synthetic.generate(200, "train", passages=6, counterfactual=0.5))
    assert {row["metadata"]["type"] for row in rows} == set(synthetic.TYPES)
    for row in rows:
        gold = " ".join(f"{c['title']} {c['text']}" for c in row["contexts"] if c["is_supporting"])
        answer, kind = row["golden_answers"][0], row["metadata"]["type"]
        assert len(row["contexts"]) == 6 and len({c["title"] for c in row["contexts"]}) == 6
        assert answer in gold if kind != "yes_no" else answer in ("yes", "no")
        wrong = row["metadata"]["counterfactual"]
        if wrong:
            claims = [c for c in row["contexts"] if c["title"].endswith("(rumours)")]
            assert len(claims) == 1 and wrong != answer
    yes = [row["golden_answers"] == ["yes"] for row in rows if row["metadata"]["type"] == "yes_no"]
    assert 10 < sum(yes) < 40 and sum(r["metadata"]["counterfactual"] is not None for r in rows) in range(70, 130)


def test_synthetic_splits_share_no_entity():
    def entities(split, seed):
        rows = synthetic.generate(300, split, seed=seed)
        return {c["title"] for row in rows for c in row["contexts"]} | {e for r in rows for e in r["metadata"]["gold"]}

    train, held_out = entities("train", 0) | entities("train", 5), entities("eval", 0) | entities("eval", 9)
    assert len(train) > 500 and not train & held_out


@pytest.mark.slow
@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_synthetic_worlds_do_not_run_out_of_names(split):
    """Of towns and regions there are few names; a large world asks about more works, and ends."""
    rows = list(synthetic.generate(12_000, split))
    assert len({row["question"] for row in rows}) == 12_000


def test_synthetic_distractors_share_an_entity_and_gold_can_miss():
    names = lambda c: set(re.findall(r"(?:[A-Z][a-z]+ )*[A-Z][a-z]+", f"{c['title']}. {c['text']}")) - {"The", "It"}
    for row in synthetic.generate(120, "eval", passages=5):
        gold = set().union(*(names(c) for c in row["contexts"] if c["is_supporting"]))
        assert any(names(c) & gold for c in row["contexts"] if not c["is_supporting"]), row
    for row in synthetic.generate(60, "eval", passages=5, missing_gold=1.0):
        supporting = [c for c in row["contexts"] if c["is_supporting"]]
        assert len(supporting) == len(row["metadata"]["gold"]) - 1
        assert row["metadata"]["missing_gold"] not in {c["title"] for c in row["contexts"]}
    with pytest.raises(ValueError, match="fractions"):
        next(synthetic.generate(1, "eval", missing_gold=2.0))
