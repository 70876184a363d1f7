"""Noise: what is added, removed and reordered, and what never is."""

import pytest

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.rag import answers, noise, synthetic
from roserag_jax.retrieval.bm25 import BM25

ROWS = list(synthetic.generate(24, "eval", passages=6))
POOL = [c for row in ROWS for c in row["contexts"]]
KEY = lambda c: (c["title"], c["text"])
SEARCH = lambda: BM25(POOL)


@pytest.mark.parametrize("name", ["random2", "same_topic2", "counterfactual2"])
def test_noise_adds_wrong_passages_and_keeps_the_rest(name):
    made = noise.Noise(name, 0, ROWS, POOL, SEARCH)
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
        assert beyond >= 4
    # The order of the questions plays no part.
    again = noise.Noise(name, 0, ROWS, POOL, SEARCH)
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
        with pytest.raises(UserError, match="is none of none, shuffled, no_gold, random<n>"):
            options.validate(config)


def test_noise_swaps_gold_for_hard_negatives():
    """At its place, by a passage that is not the question's gold and does not answer it; the rest stays."""
    for name, most in (("swapped1", 1), ("swapped9", 9)):
        made = noise.Noise(name, 0, ROWS, POOL, SEARCH)
        for row in ROWS:
            shown, gold = made.passages(row, 4), sum(c["is_supporting"] for c in row["contexts"][:4])
            changed = [(a, b) for a, b in zip(row["contexts"][:4], shown, strict=True) if a is not b]
            assert len(changed) == min(most, gold) and all(a["is_supporting"] for a, _ in changed)
            golden = [a for a in row["golden_answers"] if a not in ("yes", "no")]
            assert not any(b["is_supporting"] or answers.is_answered_by(b, golden) for _, b in changed)
    with pytest.raises(UserError, match="swapped needs is_supporting"):
        made.passages({**ROWS[0], "contexts": [{"title": "", "text": "x"}]}, 3)


def test_noise_of_a_weak_retriever_finds_less():
    """What BM25 finds with half of the words has gold passages, flagged, but fewer than with all of them."""
    made = noise.Noise("weak", 0, ROWS, POOL, SEARCH)
    weak = [sum(c["is_supporting"] for c in made.passages(row, 4)) for row in ROWS]
    found = made.index.search([row["question"] for row in ROWS], 4)
    gold = [{KEY(c) for c in row["contexts"] if c["is_supporting"]} for row in ROWS]
    strong = [sum(KEY(c) in own for c in contexts) for own, contexts in zip(gold, found, strict=True)]
    assert 0 < sum(weak) < sum(strong)
    assert all(len(made.passages(row, 4)) == 4 for row in ROWS)


def test_noise_truncates_the_end_of_passages():
    text = "One two three four, five six seven eight."
    row = {
        "id": "1",
        "golden_answers": ["x"],
        "contexts": [{"title": "T", "text": text}, {"title": "", "text": "燕鸥博物馆。"}],
    }
    cut = lambda name: [c["text"] for c in noise.Noise(name, 0, [row], []).passages(row, 2)]
    assert cut("truncated50") == ["One two three four", "燕鸥"]
    assert cut("truncated1") == ["One two three four, five six seven", "燕鸥博物"]
    assert cut("truncated100") == ["", ""]


@pytest.mark.parametrize("percent", [5, 50, 100])
def test_noise_mistypes_a_percentage_of_words(percent):
    """Letters are lost, doubled or swapped; titles stay, and so does the number of words."""
    text = " ".join(f"quick{i} brown{i}" for i in range(300))
    passages = [{"title": "T", "text": text}, {"title": "", "text": "燕鸥博物馆由伦德女士创办。" * 40}]
    row = {"id": "1", "golden_answers": ["x"], "contexts": passages}
    spaced, unspaced = noise.Noise(f"typos{percent}", 0, [row], []).passages(row, 2)
    mistyped = [a != b for a, b in zip(text.split(), spaced["text"].split(), strict=True)]
    assert abs(100 * sum(mistyped) / 600 - percent) < 5 and spaced["title"] == "T"
    assert 0.8 < len(unspaced["text"]) / len(passages[1]["text"]) < 1.2 and unspaced != passages[1]
    assert [spaced, unspaced] == noise.Noise(f"typos{percent}", 0, [row], []).passages(row, 2)


def test_parse_names_all_conditions():
    names = {"none": ("none", 0), "typos100": ("typos", 100), "same_topic12": ("same_topic", 12), "weak": ("weak", 0)}
    assert {name: noise.parse(name) for name in names} == names
    for bad in ("typos101", "typos", "weak2", "random01", "random٣", "none0", "Random2", " random2", "random2\n"):
        with pytest.raises(ValueError, match=r"typos<p>, truncated<p>"):
            noise.parse(bad)
    assert all(kind in noise.describe() for kind in noise.CONDITIONS)
    assert noise.describe() in options.EVALUATE["noise"].help


def test_noise_adds_no_passage_with_the_answer_in_any_script():
    """Where words are not separated by spaces too, and counterfactual copies replace the answer there."""
    gold = {"title": "燕鸥博物馆", "text": "燕鸥博物馆由伦德女士于1901年创办。", "is_supporting": True}
    row = {"id": "1", "question": "燕鸥博物馆由谁创办？", "golden_answers": ["伦德女士"], "contexts": [gold]}
    other = {"id": "2", "question": "谁？", "golden_answers": ["王先生"], "contexts": []}
    pool = [{"title": "", "text": f"伦德女士创办了第{i}座博物馆。"} for i in range(9)]
    pool.append({"title": "", "text": "长河博物馆位于北方。"})
    for name in ("random1", "same_topic1"):
        (added,) = [
            c for c in noise.Noise(name, 0, [row, other], pool, lambda: BM25(pool)).passages(row, 1) if c is not gold
        ]
        assert added["text"] == "长河博物馆位于北方。"
    (claim,) = [c for c in noise.Noise("counterfactual1", 0, [row, other], []).passages(row, 1) if c is not gold]
    assert claim["text"] == "燕鸥博物馆由王先生于1901年创办。"
