"""Words: one notion of them in every script."""

import time
import unicodedata

import pytest

from roserag_jax.rag import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("District 7: vitamin C, O’Brien's well-known shop.", "district 7 vitamin c o brien s well known shop"),
        (
            "燕鸥在1901年，ＡＢ",
            "燕 鸥 在 1901 年 ab",
        ),  # Chinese, full-width
        ("iPhone手机", "iphone 手 机"),
        ("ｶﾞﾗｽの", "ガ ラ ス の"),  # Japanese, half-width katakana
        ("서울은 2시", "서 울 은 2 시"),  # Korean
        ("พิพิธ", "พิ พิ ธ"),  # Thai
        (
            "नदी के पास।",
            "नदी के पास",
        ),
        (
            "أحم\u064eد ١٩",
            "احمد 19",
        ),  # Arabic hamza, vowel sign, digits
        ("ש\u05c1\u05b8לו\u05b9ם", "שלום"),  # Hebrew points
        (
            "Москва\u0301 Йод",
            "москва йод",
        ),
        (
            "İstanbul STRASSE Straße Οδός",
            "istanbul strasse strasse οδόσ",
        ),
        ("Ber\u00adlin Tr\u200bee iPhone™ €5 🦉", "berlin tr ee iphone € 5 🦉"),
        ("Yorùbá ọ̀rọ̀ e̩kun バ", "yorùbá ọ̀rọ̀ e̩kun バ"),  # accents that no letter has composed
        ("п\u02bcять Hawai\u02bbi п\u2019ять", "п ять hawai i п ять"),
        ("foo_bar — … 「」 !", "foo bar"),
        ("", ""),
    ],
)
def test_words_of_scripts(text, expected):
    """The same composed and decomposed, and each word has its place in the text."""
    assert words.words(text) == expected.split()
    for form in ("NFC", "NFD"):
        assert words.words(unicodedata.normalize(form, text)) == expected.split()
    composed = unicodedata.normalize("NFC", text)
    if "\u02bc" not in text:
        assert len(words.spans(composed)) == len(expected.split()) + text.count("\u00ad") + text.count("™")
    assert "".join(words.pieces(composed)) == composed


def test_terms_are_words_and_neighbours():
    assert words.terms("Oslo 北京市，河") == (["oslo", "北", "京", "市", "北京", "京市", "河"])
    assert words.terms("café noir") == ["café", "noir"]


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("He lives in New York City.", "new york", True),
        ("He lives in Newark.", "new", False),
        ("北京市是首都。", "北京", True),
        ("北方京剧", "北京", False),
        ("서울은 크다", "서울", True),  # with its particle
        (
            "กรุงเทพมหานคร",
            "กรุงเทพ",
            True,
        ),
        ("नदियाँ", "नद", False),  # a vowel sign belongs to the word
        ("Cafe\u0301 de Flore", "café", True),
        ("anything", "...", False),
    ],
)
def test_contains_complete_words(text, part, expected):
    assert words.contains(text, part) is expected
    if part != "...":
        assert bool(words.pattern(part).search(unicodedata.normalize("NFC", text))) is expected


def test_words_of_long_texts_take_linear_time():
    """A page without a space is no harder than one with spaces."""
    start = time.monotonic()
    assert len(words.words("燕" * 300_000)) == len(words.pieces("燕" * 300_000)) == 300_000
    assert len(words.terms("a" * 10**6 + "\u0301" * 10**5)) == 1
    assert len(words.words("a" + "\u0301\u0323" * 10**5)) == 1  # marks in an order that is not the canonical one
    assert time.monotonic() - start < 20
