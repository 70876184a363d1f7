"""Noise: what is added, removed and reordered, and what never is."""

import pytest

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.rag import answers, noise, synthetic

ROWS = list(synthetic.generate(24, "eval", passages=6))
POOL = [c for row in ROWS for c in row["contexts"]]
KEY = lambda c: (c["title"], c["text"])


@pytest.mark.parametrize("name", ["random2", "same_topic2", "counterfactual2"])
def test_noise_adds_wrong_passages_and_keeps_the_rest(name):
    made = noise.Noise(name, 0, ROWS, POOL)
    places, shared, beyond = set(), 0, 0
    for row in ROWS:
        own = row["contexts"][:4]
        shown = made.passages(row, 4)
        added = [c for c in shown if KEY(c) not in {KEY(o) for o in own}]
        assert [c for c in shown if c not in added] == own and len(added) == 2
        assert not any(c["is_supporting"] for c in added)
        assert not {KEY(c) for c in row["contexts"] if c["is_supporting"]} & {KEY(c) for c in added}
        beyond += any(c in row["contexts"][4:] for c in added)
        golden = row["golden_answers"]
        if golden[0] not in ("yes", "no"):
            assert not any(answers.contains(f"{c['title']} {c['text']}", golden) for c in added)
        places.add(tuple(c in added for c in shown))
        words = set(answers.normalize(row["question"]).split())
        shared += sum(len(words & set(answers.normalize(c["text"]).split())) for c in added)
    assert len(places) > 4
    if name == "same_topic2":  # what was found for a question but is not shown is of its topic
        assert beyond > 4
    # The order of the questions plays no part.
    again = noise.Noise(name, 0, ROWS, POOL)
    backwards = {row["id"]: again.passages(row, 4) for row in reversed(ROWS)}
    assert all(backwards[row["id"]] == made.passages(row, 4) for row in ROWS)
    if name != "counterfactual2":  # hard negatives are of the question's topic, random ones are not
        test_noise_adds_wrong_passages_and_keeps_the_rest.shared[name] = shared
        both = test_noise_adds_wrong_passages_and_keeps_the_rest.shared
        assert len(both) < 2 or both["same_topic2"] > 1.3 * both["random2"]


test_noise_adds_wrong_passages_and_keeps_the_rest.shared = {}


def test_counterfactual_states_a_wrong_answer():
    made = noise.Noise("counterfactual1", 0, ROWS, POOL)
    for row in ROWS:
        (claim,) = [c for c in made.passages(row, 6) if c not in row["contexts"]]
        golden = row["golden_answers"][0]
        if golden in ("yes", "no"):
            assert claim["text"].endswith(f"is {'no' if golden == 'yes' else 'yes'}.")
        else:
            wrong = [a for a in made.answers if answers.contains(claim["title"] + " " + claim["text"], [a])]
            assert wrong and golden not in wrong


def test_counterfactual_contains_no_alias_and_no_part_of_the_answer():
    passage = {"title": "Ada", "text": "Ada was born in NYC (New York City).", "is_supporting": True}
    row = {"id": "1", "question": "Where?", "golden_answers": ["NYC", "New York City"], "contexts": [passage]}
    others = [{"golden_answers": [a]} for a in ("New York City, USA", "York", "Oslo")]
    (claim,) = [c for c in noise.Noise("counterfactual1", 0, [row, *others], []).passages(row, 1) if c is not passage]
    assert claim["text"] == "Ada was born in Oslo (Oslo)."
    # Spelt as no pattern of the answer finds it, it would stay: a bare statement then.
    spelt = {**passage, "text": "NYC, or New York-City, or The New  York City."}
    (claim,) = [
        c
        for c in noise.Noise("counterfactual1", 0, [row, *others], []).passages({**row, "contexts": [spelt]}, 1)
        if c is not spelt
    ]
    assert claim["text"] == 'The answer to the question "Where?" is Oslo.'


def test_noise_removes_gold_and_shuffles():
    row = ROWS[0]
    without = noise.Noise("no_gold", 0, ROWS, []).passages(row, 3)
    assert len(without) == 3 and not any(c["is_supporting"] for c in without)
    shuffled = [noise.Noise("shuffled", seed, ROWS, []).passages(row, 6) for seed in range(4)]
    assert all(sorted(map(KEY, s)) == sorted(map(KEY, row["contexts"])) for s in shuffled)
    assert len({tuple(map(KEY, s)) for s in shuffled}) > 1
    bare = {**row, "contexts": [{"title": "", "text": "x"}]}
    with pytest.raises(UserError, match="no_gold needs is_supporting"):
        noise.Noise("no_gold", 0, ROWS, []).passages(bare, 3)
    with pytest.raises(UserError, match="finds only 0 passages"):
        noise.Noise("random3", 0, ROWS, []).passages(row, 3)
    for bad in ("random", "random0", "hard3", ""):
        config = options.defaults()
        config.model = config.workdir = "x"
        config.evaluate.noise = (bad,)
        with pytest.raises(UserError, match="is none of none, no_gold, shuffled, random<n>"):
            options.validate(config)
