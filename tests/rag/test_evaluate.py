"""The measure of several systems: noise, official scores and files, comparisons."""

import json
import random

import numpy as np
import pytest

from roserag_jax import evaluate, options
from roserag_jax.errors import UserError
from roserag_jax.rag import answers, metrics, noise, synthetic
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.report import plot, tables


@pytest.mark.parametrize(
    ("prediction", "golden", "expected"),
    [
        ("Yes, it is.", ["yes"], 1.0),
        ("true", ["yes"], 1.0),
        ("No", ["yes"], 0.0),
        ("perhaps", ["no"], 0.0),
        ("noon", ["no"], 0.0),
        ("yes", ["Ada"], None),
    ],
)
def test_yes_no_accuracy(prediction, golden, expected):
    assert answers.yes_no_accuracy(prediction, golden) == expected


def test_distraction_ratio():
    assert metrics.distraction_ratio(40.0, 30.0) == 0.25 and metrics.distraction_ratio(30.0, 40.0) == 0.0
    assert metrics.distraction_ratio(0.0, 10.0) is None


def test_paired_test_is_mcnemars_on_right_and_wrong():
    """Against scipy's exact binomial test of the discordant pairs; and nothing is found between equal runs."""
    from scipy import stats

    rng = np.random.default_rng(0)
    ours, theirs = (rng.random(40) < 0.7).astype(float), (rng.random(40) < 0.4).astype(float)
    ours[24:] = theirs[24:]
    found = metrics.paired(ours, theirs)
    exact = stats.binomtest(found["better"], found["better"] + found["worse"]).pvalue
    assert found["better"] + found["worse"] <= 13 and found["p"] == pytest.approx(exact)
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean())
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert metrics.paired(ours, ours) == {"difference": 0.0, "interval": (0.0, 0.0), "better": 0, "worse": 0, "p": 1.0}
    assert metrics.paired([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])["p"] == 1.0
    surer = metrics.paired(np.tile(ours, 5), np.tile(theirs, 5))
    assert surer["p"] < found["p"] and surer == metrics.paired(np.tile(ours, 5), np.tile(theirs, 5))


ROWS = list(synthetic.generate(24, "eval", passages=6))
POOL = [c for row in ROWS for c in row["contexts"]]
KEY = lambda c: (c["title"], c["text"])


@pytest.mark.parametrize("name", ["random2", "same_topic2", "counterfactual2"])
def test_added_passages_are_wrong_and_the_rest_stays(name):
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
        test_added_passages_are_wrong_and_the_rest_stays.shared[name] = shared
        both = test_added_passages_are_wrong_and_the_rest_stays.shared
        assert len(both) < 2 or both["same_topic2"] > 1.3 * both["random2"]


test_added_passages_are_wrong_and_the_rest_stays.shared = {}


def test_counterfactuals_state_a_wrong_answer():
    made = noise.Noise("counterfactual1", 0, ROWS, POOL)
    for row in ROWS:
        (claim,) = [c for c in made.passages(row, 6) if c not in row["contexts"]]
        golden = row["golden_answers"][0]
        if golden in ("yes", "no"):
            assert claim["text"].endswith(f"is {'no' if golden == 'yes' else 'yes'}.")
        else:
            wrong = [a for a in made.answers if answers.contains(claim["title"] + " " + claim["text"], [a])]
            assert wrong and golden not in wrong


def test_counterfactuals_hold_no_alias_and_no_part_of_the_answer():
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


def test_gold_removed_and_order_shuffled():
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


def test_closed_book_examples_name_no_passage(smollm_tokenizer):
    closed = PromptBuilder(smollm_tokenizer, 900, 0, 2).plain(ROWS[0]).text
    assert "assage" not in closed and closed.count("Answer: ") == 2
    one = PromptBuilder(smollm_tokenizer, 900, 1, 2).plain(ROWS[0]).text
    assert "Passage 2: Moss Hill" in one  # an example keeps the passages that its answer speaks of


def test_strategyqa_predictions():
    rng = random.Random(0)
    rows = [
        {"id": str(i), "prediction": rng.choice(["yes", "No way", "hm"]), "scores": {"accuracy": 1.0}} for i in range(6)
    ]
    files = evaluate._official(rows)
    found = json.loads(files["predictions_strategyqa.json"])
    expected = {"yes": True, "No way": False, "hm": None}
    assert {i: row["answer"] for i, row in found.items()} == {r["id"]: expected[r["prediction"]] for r in rows}
    rows[0]["scores"]["accuracy"] = None
    assert set(evaluate._official(rows)) == {"predictions.json"}


def test_markdown():
    assert tables.markdown(["a", "b"], [["x|y", "1  [0]"]]) == "| a | b |\n|---|---:|\n| x\\|y | 1 [0] |"


def evaluation(system, passages, noise, em):
    bounds = {f"{m}_interval": [em - 5.0, em + 5.0] for m in ("em", "f1")}
    return {"system": system, "passages": passages, "noise": noise, "em": em, "f1": em, "questions": 9, **bounds}


def test_plots(tmp_path):
    """Curves in the order of the axis, each system its line; the picture names them."""
    runs = [("base", k, "none", 20.0 + k) for k in (10, 1, 5)] + [("rose", 5, n, 40.0) for n in ("random10", "none")]
    runs += [("rose", 5, n, 30.0) for n in ("random2", "shuffled")] + [("closed_book", 0, "none", 10.0)]
    results = {f"{s}-{k}-{n}" if k else s: evaluation(s, k, n, em) for s, k, n, em in runs}
    axis, lines = plot.curves(results, "passages")
    assert (
        axis == [1, 5, 10]
        and [lines["base"][k]["em"] for k in axis] == [21.0, 25.0, 30.0]
        and set(lines["rose"]) == {5}
    )
    assert plot.curves(results, "noise")[0] == ["none", "shuffled", "random2", "random10"]
    with pytest.raises(UserError, match="There are 1 values of noise"):
        plot.curves(results, "noise", passages=10)
    pytest.importorskip("matplotlib")
    for over in ("passages", "noise"):
        plot.draw(results, tmp_path / f"{over}.png", over)
        plot.draw(results, tmp_path / f"{over}.svg", over, "f1")
        assert (tmp_path / f"{over}.png").stat().st_size > 5000 and (tmp_path / f"{over}.svg").stat().st_size > 5000
