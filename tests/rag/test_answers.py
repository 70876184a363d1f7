"""Answers: finding one in a response, and measuring it against the golden ones."""

import pytest

from roserag_jax.rag import answers


@pytest.mark.parametrize(
    ("prediction", "golden", "em", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("Eiffel", ["Eiffel Tower", "Louvre"], 0, 2 / 3),
        ("well-known", ["wellknown"], 1, 1),  # hyphens join words
        ("the", ["a"], 1, 0),  # both empty after normalising
        ("yes indeed", ["yes"], 0, 0),  # a closed answer has F1 0 against anything but itself
        ("no", ["yes", "no"], 1, 1),
        ("noanswer", ["no answer"], 0, 0),
        ("a b a", ["a a b"], 1, 1),
        ("x x y", ["x y y"], 0, 2 / 3),
    ],
)
def test_scores_equal_the_official_ones(prediction, golden, em, f1):
    assert answers.exact_match(prediction, golden) == em
    assert answers.f1(prediction, golden) == pytest.approx(f1)


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
def test_yes_no_accuracy_of_the_first_word(prediction, golden, expected):
    assert answers.yes_no_accuracy(prediction, golden) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It is by Ada.\nAnswer: Ada Lund.", ("It is by Ada.", "Ada Lund", True)),
        ("Because.\n**Answer:** Paris\nAnswer: Rome", ("Because.", "Paris", True)),
        ("So the\nfinal answer is: 1984", ("So the", "1984", True)),
        ("So.\nThe answer is: 1984", ("So.", "1984", True)),
        ("It is by Ada. Answer: Ada.", ("It is by Ada.", "Ada", True)),
        ("Answer: no", ("", "no", True)),
        ("Thinking.\nParis.", ("Thinking.\nParis.", "Paris", False)),
        ("Reason.\nAnswer:", ("Reason.\nAnswer:", "Answer:", False)),
        ("", ("", "", False)),
    ],
)
def test_parse(response, expected):
    assert answers.parse(response) == expected


@pytest.mark.parametrize(
    ("response", "thinking", "expected"),
    [
        ("<think>\nAnswer: Oslo\n</think>\n\nMoss is.\nAnswer: Bath", False, ("Moss is.", "Bath", True)),
        ("It may be.\nAnswer: Oslo\n</think>\nAnswer: Bath", True, ("", "Bath", True)),
        ("<think>So.\nAnswer: Oslo", False, ("", "", False)),
        ("So.\nAnswer: Oslo", True, ("", "", False)),
        ("<think>a</think><think>b</think>Bath", False, ("Bath", "Bath", False)),
        ("Moss.\nAnswer: Bath\n<think>Or\nAnswer: Oslo", False, ("Moss.", "Bath", True)),
        ("<think>\n\n</think>\n\n", False, ("", "", False)),
    ],
)
def test_parse_reads_behind_thoughts(response, thinking, expected):
    assert answers.parse(response, thinking) == expected
