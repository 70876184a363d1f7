"""Metrics: means, intervals, groups, and two runs compared."""

import numpy as np
import pytest

from roserag_jax.rag import metrics


def test_summarize_counts_and_groups():
    row = {"golden_answers": ["x"], "contexts": [{"title": "", "text": "", "is_supporting": s} for s in (True, False)]}
    scores = [metrics.score_row(row, p, True) for p in ("x", "y", "x", "x")]
    scores.append(metrics.score_row({"golden_answers": ["x"], "metadata": {"type": "hard"}}, "z", False))
    result = metrics.summarize(scores)
    assert (result["questions"], result["em"], result["parsed"]) == (5, 60.0, 80.0)
    assert result["by_gold_passages"]["1"] == {"questions": 4, "em": 75.0, "f1": 75.0}
    assert result["by_type"]["hard"]["em"] == 0 and result["em_interval"][0] < 60 < result["em_interval"][1]


def test_distraction_ratio_is_never_negative():
    assert metrics.distraction_ratio(40.0, 30.0) == 0.25 and metrics.distraction_ratio(30.0, 40.0) == 0.0
    assert metrics.distraction_ratio(0.0, 10.0) is None


def test_paired_of_right_and_wrong_is_mcnemars():
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


def test_interval_of_many_values_is_bounded_in_memory():
    """The same as of all draws at once, in a fraction of the memory: a million values would take 30 GB."""
    import tracemalloc

    values = np.random.default_rng(1).random(1237)
    picks = np.random.default_rng(3).integers(0, 1237, (501, 1237))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    assert metrics.interval(values, 501, 3) == (low, high)
    values = np.random.default_rng(2).random(10**6)
    tracemalloc.start()
    low, high = metrics.interval(values, 20)
    assert low < values.mean() < high and tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_paired_of_many_questions_is_bounded_in_memory(monkeypatch):
    """The permutations are drawn some at a time, with the same result."""
    from scipy import stats

    drawn, permutation_test = [], stats.permutation_test
    monkeypatch.setattr(
        stats, "permutation_test", lambda *a, **k: drawn.append(k["batch"]) or permutation_test(*a, **k)
    )
    rng = np.random.default_rng(0)
    scores, others = rng.integers(0, 2, 900).astype(float), rng.integers(0, 2, 900).astype(float)
    at_once = metrics.paired(scores, others, draws=200)
    monkeypatch.setattr(metrics, "_AT_ONCE", 2000)
    assert metrics.paired(scores, others, draws=200) == at_once
    changed = at_once["better"] + at_once["worse"]
    assert drawn == [10**6 // changed, 2000 // changed] and drawn[1] < 200


def test_score_retrieval_tells_the_retriever_from_the_reader():
    passage = lambda text, gold: {"title": "", "text": text, "is_supporting": gold}
    shown = [passage("Moss.", False), passage("Ada made it.", True), passage("Rust.", False)]
    row = {"golden_answers": ["Ada"], "contexts": shown, "gold_count": 2}
    found = metrics.score_row(row, "Bo", True)
    assert found["em"] == 0 and found["retrieval"] == {"recall": 0.5, "reciprocal_rank": 0.5, "answer_recall": 1.0}
    missed = metrics.score_row({**row, "contexts": shown[:1]}, "Bo", True)
    assert missed["retrieval"] == {"recall": 0.0, "reciprocal_rank": 0.0, "answer_recall": 0.0}
    yes = metrics.score_row({**row, "golden_answers": ["yes"], "gold_count": None}, "yes", True)
    assert yes["retrieval"] == {"recall": None, "reciprocal_rank": None, "answer_recall": None}
    assert metrics.score_retrieval({**row, "golden_answers": []})["answer_recall"] is None
    closed_book = metrics.score_row({"golden_answers": ["Ada"], "contexts": []}, "Ada", True)
    assert closed_book["retrieval"] is None
    summary = metrics.summarize([found, missed, yes, closed_book])
    assert summary["retrieval"] == {"recall": 25.0, "reciprocal_rank": 25.0, "answer_recall": 50.0}
    assert "retrieval" not in metrics.summarize([closed_book])


def test_gold_count_knows_what_was_not_found():
    flagged = [{"is_supporting": True}, {"is_supporting": False}]
    assert (
        metrics.gold_count({"contexts": flagged}) == 1
        and metrics.gold_count({"contexts": flagged, "gold_count": 2}) == 2
    )
    assert metrics.gold_count({"contexts": [*flagged, {}]}) is None


@pytest.mark.parametrize(
    ("said", "golden", "expected"),
    [
        ("the cat sat on the mat", ["the cat lay on a mat"], 2 / 3),  # 4 of 6 words in order, on both sides
        ("Ein Mann ging nach Köln.", ["Der Mann ging nach KÖLN", "Nichts"], 0.8),  # 4 of 5
        ("北京是首都", ["北京是中国的首都"], 10 / 13),  # 5 of 5 and 5 of 8 characters
        ("القَاهِرة عاصمة", ["القاهرة هي عاصمة مصر"], 2 / 3),  # 2 of 2 and 2 of 4, vowel signs aside
        ("", ["nothing"], 0.0),
        ("...", ["..."], 0.0),
    ],
)
def test_rouge_l_counts_words_of_any_language(said, golden, expected):
    assert metrics.RougeL()(said, golden) == pytest.approx(expected)


def test_rouge_l_of_english_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    theirs, rng = RougeScorer(["rougeL"]), np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(["the", "mill", "Burns", "in", "1901", "again."], rng.integers(1, 12)))
    for _ in range(40):
        said, golden = text(), [text(), text()]
        assert metrics.RougeL()(said, golden) == theirs.score_multi(golden, said)["rougeL"].fmeasure
