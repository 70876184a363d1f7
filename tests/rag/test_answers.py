"""Answers: finding one in a response, and measuring it against the golden ones."""

import pytest

from roserag_jax import options
from roserag_jax.errors import UserError
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
    assert answers.HOTPOTQA.exact_match(prediction, golden) == em
    assert answers.HOTPOTQA.f1(prediction, golden) == pytest.approx(f1)


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


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (
            "在北方。\nAnswer：北京。",
            ("在北方。", "北京", True),
        ),
        (
            "在北方。Answer：「北京」。",
            ("在北方。", "北京", True),
        ),
        ("It is so! Answer: “Bath.”", ("It is so!", "Bath", True)),
        (
            "है। Answer: दिल्ली।",
            ("है।", "दिल्ली", True),
        ),
        ("So.\n\ufeffAnswer: Bath", ("So.", "Bath", True)),
        ("So.\nAn\u200bswer: Bath", ("So.", "Bath", True)),
        ("北京。", ("北京。", "北京", False)),
    ],
)
def test_parse_of_other_scripts(response, expected):
    assert answers.parse(response) == expected


# The values of the official scripts (facebookresearch/MLQA, apple/ml-mkqa).
@pytest.mark.parametrize(
    ("metric", "language", "prediction", "golden", "em", "f1"),
    [
        ("mlqa", "zh", "《燕鸥博物馆》。", "燕鸥博物馆", 1, 1),
        ("mlqa", "zh", "北京市", "北京", 0, 0.8),
        ("mlqa", "zh", "NASA总部", "NASA 总部", 1, 1),
        ("mlqa", "es", "El Río Grande", "río grande", 1, 1),
        ("mlqa", "de", "“Der Kaiser”", "Kaiser", 1, 1),
        ("mlqa", "ar", "الكتاب", "كتاب", 1, 1),
        ("mlqa", "vi", "của Hà Nội", "Hà Nội", 1, 1),
        ("mlqa", "hi", "दिल्ली।", "दिल्ली", 1, 1),
        ("mlqa", "en", "yes indeed", "yes", 0, 2 / 3),
        ("mlqa", "en", "the", "a", 1, 0),
        ("mkqa", "ja", "東京都", "東京", 0, 0.8),
        ("mkqa", "ja", "東京。", "東京", 0, 0.8),
        (
            "mkqa",
            "th",
            "กรุงเทพมหานคร",
            "กรุงเทพ",
            0,
            0.7,
        ),
        ("mkqa", "fr", "les Alpes du Nord", "Alpes Nord", 0, 0.8),
        ("mkqa", "ko", "서울 은", "서울", 0, 2 / 3),
        ("mkqa", "zh_tw", "101 大樓", "101大樓", 1, 1),
        ("mkqa", "hu", "a Duna", "Duna", 1, 1),
        ("mkqa", "en", "the", "a", 1, 1),
    ],
)
def test_scores_of_languages_equal_the_official_ones(metric, language, prediction, golden, em, f1):
    measure = answers.Measure(metric, language)
    assert measure.exact_match(prediction, ["x", golden]) == em
    assert measure.f1(prediction, ["x", golden]) == pytest.approx(f1)


def test_measure_of_an_unknown_language_is_refused():
    for metric, language in (("mlqa", "ja"), ("mkqa", ""), ("mkqa", "zh")):
        with pytest.raises(ValueError, match=f"{metric} is defined for ar, "):
            answers.Measure(metric, language)


@pytest.mark.parametrize(
    ("text", "golden", "expected"),
    [
        ("首都是北京。", "北京", 1),
        ("東京は首都です。", "東京", 1),
        ("수도는 서울이다.", "서울", 1),
        ("م\u064fتحف", "متحف", 1),
        ("Paris–Dakar", "Paris", 1),
        ("Parisian", "Paris", 0),
    ],
)
def test_contains_answers_of_scripts(text, golden, expected):
    assert answers.contains(text, [golden]) == expected
    assert answers.is_answered_by({"title": "", "text": text}, [golden]) == bool(expected)


def test_metric_and_language_are_options():
    """Checked together, and part of the recipes of what they judge."""
    config = options.defaults()
    config.model = config.workdir = "x"
    for metric, language, good in (
        ("mlqa", "zh", True),
        ("mkqa", "ja", True),
        ("mlqa", "ja", False),
        ("mkqa", "", False),
    ):
        config.evaluate.metric, config.data.language = metric, language
        if good:
            options.validate(config)
            continue
        with pytest.raises(
            UserError, match=rf"config\.data\.language='{language}': config.evaluate.metric={metric} needs one"
        ):
            options.validate(config)
    config.evaluate.metric, config.data.language = "hotpotqa", "de"
    with pytest.raises(UserError, match="hotpotqa has no languages"):
        options.validate(config)


def test_parse_without_an_answer_line_takes_the_complete_response():
    """Thoughts aside; a line that looks like an answer line is text as any other."""
    text = "The mill burned.\nAnswer: it was rebuilt."
    assert answers.parse(f"<think>Hm.</think>\n{text}\n", answer_line=False) == ("", text, True)
    assert answers.parse(f"Hm.</think>{text}", thinking=True, answer_line=False) == ("", text, True)
    assert answers.parse("Hm.", thinking=True, answer_line=False) == ("", "", False)
