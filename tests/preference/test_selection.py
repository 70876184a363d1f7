"""Which candidates make the pair, and what is said about it."""

import pytest

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.preference import selection
from roserag_jax.rag.answers import Measure
from roserag_jax.rag.prompts import HINT

PASSAGES = [{"title": "Cabin", "text": "The cabin of 1850 stands in Bath, Maine, beside the river Kennebec."}]


@pytest.mark.parametrize(
    ("rationale", "named"),
    [
        (HINT.format(answer="Bath, Maine").strip(), 0),
        ("So the correct answer to the question is Bath, Maine, as the passages say.", 0),
        ("Bath, Maine.", 0),
        ("It lies in Sweden, Europe.", 0),  # words of no passage
        ("Passage 1 says that the cabin stands in Bath, Maine.", 2),
        ("The year is 1850.", 1),
    ],
)
def test_evidence_is_what_the_hint_does_not_give(rationale, named):
    assert len(selection.evidence([rationale], ["Bath, Maine"], PASSAGES)[0]) == named


def candidate(rationale, answer, logprob, source="guided"):
    return {
        "response": f"{rationale}\nAnswer: {answer}",
        "rationale": rationale,
        "answer": answer,
        "source": source,
        "correct": answer == "Bath",
        "logprob": logprob,
        "tokens": 10,
    }


def chosen_and_rejected(candidates, golden=("Bath",), **changes):
    select = options.defaults().select
    select.update(changes)
    row = {"id": "q", "prompt": "p", "golden_answers": list(golden), "candidates": candidates}
    pairs, counts = selection.select([row], {"q": PASSAGES}, select, 0)
    return [(p["chosen"].split("\n")[0], p["rejected"].split("\n")[0]) for p in pairs], counts


HINTED = candidate("The answer is Bath.", "Bath", -90.0)
SURE, UNSURE = candidate("The cabin stands there.", "Bath", -10.0), candidate("Kennebec runs by it.", "Bath", -30.0)
LONG = candidate("The river says Bath, Maine.", "Bath, Maine", -20.0)
WRONG, WORSE = candidate("No idea.", "Rome", -15.0, "plain"), candidate("None at all.", "Oslo", -40.0, "plain")
ALL = [HINTED, SURE, UNSURE, LONG, WRONG, WORSE]


def test_select_never_chooses_a_restated_hint():
    pairs, counts = chosen_and_rejected(ALL)
    assert pairs == [("Kennebec runs by it.", "No idea.")] and counts["no_evidence"] == 1
    assert chosen_and_rejected(ALL, evidence=0)[0] == [("The answer is Bath.", "No idea.")]
    with pytest.raises(UserError, match="1 had no evidence"):
        chosen_and_rejected([HINTED, WRONG])


def test_evidence_counts_every_word_where_no_answer_was_shown():
    """With rewards as labels no prompt has a hint: what golden answers say too was read in the passages."""
    text = "The cabin stands beside the river."
    summary = candidate(text, "", -20.0) | {"reward": 1.0}
    other = candidate("No idea.", "", -10.0) | {"reward": -1.0}
    golden = ["The cabin of 1850 stands beside the river Kennebec in Bath, Maine."]
    assert chosen_and_rejected([summary, other], golden, labels="scores")[0] == [(text, "No idea.")]


def test_select_leaves_out_unsupported_answers():
    """`select.supported`: what leads to such an answer came from the hint. Yes and no stand nowhere and are kept."""
    assert selection.is_supported(["Oslo", "bath"], PASSAGES) and selection.is_supported(["Yes"], PASSAGES)
    assert not selection.is_supported(["Ba"], PASSAGES) and not selection.is_supported(["Rome"], [])
    assert chosen_and_rejected(ALL, supported=True)[0] == chosen_and_rejected(ALL)[0]
    made_up = [candidate("The Kennebec runs by it.", "Rome", -5.0), SURE]
    assert len(chosen_and_rejected(made_up, golden=["Rome"])[0]) == 1
    with pytest.raises(UserError, match="1 had no support"):
        chosen_and_rejected(made_up, golden=["Rome"], supported=True)


def test_select_strategies_and_matches():
    assert chosen_and_rejected(ALL, strategy="easy")[0] == [("The cabin stands there.", "None at all.")]
    assert len(chosen_and_rejected(ALL, strategy="all")[0]) == 2 * 3  # 'Bath, Maine' is not exactly 'Bath'
    pairs, counts = chosen_and_rejected(ALL, strategy="all", match="contains")
    assert len(pairs) == 3 * 2 and counts["accepted"] == {"guided": [4, 4], "plain": [0, 2]}
    assert chosen_and_rejected(ALL, strategy="random")[0] == chosen_and_rejected(ALL, strategy="random")[0]


def test_select_without_rejection_checks_nothing():
    """Any guided candidate may be chosen, also a wrong one or a restated hint, and any plain one rejected."""
    right = candidate("The cabin is in Bath.", "Bath", -1.0, "plain")
    wrong = candidate("The cabin is in Rome.", "Rome", -50.0)
    pairs, _ = chosen_and_rejected([SURE, wrong, right, WORSE], rejection=False)
    assert pairs == [("The cabin is in Rome.", "The cabin is in Bath.")]
    with pytest.raises(UserError, match="1 had one source only"):
        chosen_and_rejected([SURE, wrong], rejection=False)
    config = options.defaults()
    config.model = config.workdir = "x"
    config.select.rejection, config.generate.guided_samples = False, 0
    with pytest.raises(UserError, match="guided_samples and plain_samples are needed"):
        options.validate(config)


def test_summary_counts_candidates_and_pairs():
    select = options.defaults().select
    row = {"prompt": "p", "golden_answers": ["Bath"], "candidates": ALL, "dropped": {"repeated": 2}}
    rows = [{**row, "id": str(i)} for i in range(4)] + [{**row, "id": "x", "candidates": [SURE]}]
    pairs, counts = selection.select(rows, {row["id"]: PASSAGES for row in rows}, select, 0)
    said = selection.summary(pairs, rows, counts, "mean")
    assert "4 pairs from 5 questions (1 had all correct)" in said
    assert "guided: 13 of 17 candidates correct (76%)" in said and "plain: 0 of 8 candidates correct (0%)" in said
    assert "dropped: 4 correct ones" in said and "chosen -3.00/-3.00/-3.00, rejected -1.50/-1.50/-1.50" in said
    assert "dropped while generating: 10 repeated" in said and "words, median: chosen 6, rejected 4" in said


def test_length_warning_of_pairs_told_apart_by_length():
    pair = lambda chosen, rejected: {"chosen": "w " * chosen, "rejected": "w " * rejected}
    assert selection.length_warning([pair(20, 18), pair(15, 16), pair(30, 9)]) is None
    assert "chosen response is the longer one in 100%" in selection.length_warning([pair(30, 10)] * 5)
    assert "the rejected response" in selection.length_warning([pair(10, 30)] * 4 + [pair(20, 10)])


# A museum founded by Lady Lund; rationales that restate the hint, and rationales that read the passage.
READINGS = {
    "Chinese": (
        "燕鸥博物馆由伦德女士于1901年创办，位于下谷镇。",
        "伦德女士",
        [
            "答案是伦德女士。",
            "因此，根据段落，正确的答案是伦德女士。",
        ],
        ["段落一说燕鸥博物馆由伦德女士创办。"],
    ),
    "Japanese": (
        "伝説によると、カモメ博物館はランド夫人が設立しました。",
        "ランド夫人",
        ["段落によると、答えはランド夫人です。"],
        ["段落1は、カモメ博物館の創設者がランド夫人だと述べている。"],
    ),
    "Korean": (
        "갈매기 박물관은 1901년에 런드 여사가 설립했습니다.",
        "런드 여사",
        ["정답은 런드 여사입니다."],
        ["런드 여사가 박물관을 세웠습니다."],
    ),
    "Thai": (
        "พิพิธภัณฑ์นกนางนวลก่อตั้งโดยเลดี้ลุนด์",
        "เลดี้ลุนด์",
        ["คำตอบคือเลดี้ลุนด์"],
        ["พิพิธภัณฑ์นี้ก่อตั้งโดยเลดี้ลุนด์"],
    ),
    "Russian": (
        "Музе\u0301й основала леди Лунд.",
        "леди Лунд",
        ["The answer is леди Лунд."],
        ["В первом отрывке: музей основала леди Лунд."],
    ),
}


@pytest.mark.parametrize("language", READINGS)
def test_evidence_in_languages(language):
    passage, golden, restated, read = READINGS[language]
    passages = [{"title": "", "text": passage}]
    assert selection.evidence(restated, [golden], passages) == [set()] * len(restated)
    assert all(selection.evidence(read, [golden], passages))


def test_select_judges_by_the_metric_of_a_language():
    """An answer with full-width punctuation equals the golden one in MLQA's measure, not in HotPotQA's."""
    right = {**candidate("长河博物馆。", "《北京》", -10.0), "correct": False}
    wrong = candidate("不知道。", "上海", -10.0, "plain")
    row = {"id": "q", "prompt": "p", "golden_answers": ["北京"], "candidates": [right, wrong]}
    select = options.defaults().select
    pairs, _ = selection.select([row], {"q": []}, select, 0, Measure("mlqa", "zh"))
    assert [p["chosen"] for p in pairs] == [right["response"]]
    with pytest.raises(UserError, match="1 had none correct"):
        selection.select([row], {"q": []}, select, 0)
