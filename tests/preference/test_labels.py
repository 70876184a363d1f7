"""Labels: what the samples of a question agree on, and what that is worth."""

import pytest
from conftest import write_lines

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.preference import labels
from roserag_jax.preference.labels import Vote
from roserag_jax.preference.rewards import read_scores


def answered(*answers):
    return [{"answer": answer, "count": count} for answer, count in answers]


@pytest.mark.parametrize(
    ("candidates", "samples", "expected"),
    [
        ([("Bath", 1), ("the bath.", 2), ("Rome", 2)], 6, ("the bath.", 3)),  # one answer after normalization
        ([("Bath", 2), ("Rome", 2)], 4, (None, 2)),  # a tie
        ([("Rome", 2), ("Bath", 2)], 4, (None, 2)),  # whatever comes first
        ([("...", 3), ("Bath", 1)], 8, ("Bath", 1)),  # what normalizes to nothing is no answer
        ([], 4, (None, 0)),
    ],
)
def test_vote_takes_the_majority_after_normalization(candidates, samples, expected):
    found = labels.vote(answered(*candidates), samples)
    assert found == Vote(*expected, samples) and found.share == expected[1] / samples


def test_vote_counts_samples_without_an_answer_against_agreement():
    """Of six samples one is a repetition, two had no answer: three of six say Bath, not three of four."""
    row = {"candidates": answered(("Bath", 2), ("Bath!", 1), ("Rome", 1)), "dropped": {"repeated": 1, "no answer": 2}}
    found = labels.vote_of_row(row)
    assert (found.answer, found.votes, found.samples) == ("Bath", 3, 6)
    assert "dropped" not in labels.label_of(found, 0.5)
    assert labels.label_of(found, 0.51)["dropped"] == "low agreement"
    assert labels.label_of(Vote(None, 2, 4), 0.1)["dropped"] == "no majority"


def test_agreement_table_says_what_the_vote_is_worth():
    label = lambda answer, votes, **more: {"label": {"answer": answer, "votes": votes, "samples": 4} | more}
    rows = [label("Bath", 4), label("Rome", 4), label("Bath", 2), label("Oslo", 1, dropped="low agreement")]
    rows += [label(None, 2, dropped="no majority"), label("Bath", 4)]
    golden = [["Bath"], ["Bath"], ["bath"], ["Bath"], ["Bath"], []]  # the last is not known
    header, table = labels.agreement_table(rows, golden)
    assert header == ["agreement", "questions", "kept", "accuracy", "of those kept"]
    assert table == [
        ["25% to 50%", "1", "0", "0% of 1", ""],
        ["50% to 75%", "1", "1", "100% of 1", "100% of 1"],
        ["100%", "3", "3", "50% of 2", "50% of 2"],
        ["all", "5", "4", "50% of 4", "67% of 3"],
        ["no majority", "1", "0", "", ""],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select.agreement": 0.7}, "select.agreement=0.7: takes effect with config.select.labels=self_consistency"),
        ({"select.labels": "self_consistency", "generate.plain_samples": 1}, "lets them vote"),
        ({"select.labels": "votes"}, "choose one of gold, self_consistency"),
    ],
)
def test_label_options_that_do_not_go_together_are_refused(changes, message):
    config = options.defaults()
    config.model = config.workdir = "x"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        options.validate(config)


def judged(rewards, **changes):
    select = options.defaults().select
    select.update(changes)
    row = {"golden_answers": [], "candidates": [{"reward": reward} for reward in rewards]}
    return [c["correct"] for c in labels.judge_by_reward(row, select, None)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True, False, None]),
        ({"reward_threshold": 1.0}, [True, False, False, None]),
        ({"reward_margin": 1.0}, [True, None, False, None]),
        ({"reward_relative": True}, [True, False, False, None]),  # the mean is 2/3
        ({"reward_relative": True, "reward_threshold": -1.0}, [True, True, False, None]),
    ],
)
def test_candidates_are_judged_by_their_reward(changes, expected):
    assert judged([3.0, 0.0, -1.0, None], **changes) == expected


def scored(tmp_path, *lines):
    rows = [
        {"id": "a", "candidates": [{"response": "x"}, {"response": "y"}]},
        {"id": "b", "candidates": [{"response": "x"}]},
    ]
    return read_scores(write_lines(tmp_path / "scores.jsonl", *lines), rows)


def test_scores_are_matched_to_candidates_row_by_row(tmp_path, capsys):
    score = lambda name, text, value: {"id": name, "candidate": text, "score": value}
    found = scored(tmp_path, score("a", "y", 2), score("z", "x", 1), score("b", "x", "0.5"), score("a", "y", 2.0))
    assert found == [[None, 2.0], [0.5]]
    assert "scores of 3 of 3 candidates; 1 rows for other questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a", "candidate": "no", "score": 1}], "line 1: question 'a' has no candidate 'no'"),
        ([{"id": "a", "candidate": "x"}], "line 1: a row must be .*no 'score'"),
        ([{"id": "a", "candidate": "x", "score": 1}, {"id": "a", "candidate": "x", "score": 2}], "line 2: a second"),
        ([{"id": "c", "candidate": "x", "score": 1}], "no row is of a question"),
        ([{"id": "a", "candidate": "x", "score": True}], "line 1: a row must be"),
    ],
)
def test_scores_that_match_no_candidate_are_refused(lines, message, tmp_path):
    with pytest.raises(UserError, match=message):
        scored(tmp_path, *lines)
