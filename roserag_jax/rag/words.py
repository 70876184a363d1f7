"""Words of any language: what retrieval, containment, evidence, chunks and length statistics count.

Case, compatibility forms (full-width letters, ligatures), composed and decomposed accents, digits of other scripts,
optional vowel signs (Arabic, Hebrew) and invisible characters make no difference. Where a script separates words by
spaces, a word is a run of letters, marks and digits. Where it does not (Chinese, Japanese, Thai, Lao, Khmer, Burmese),
and in Korean, whose words carry particles, a word is one character, as its reader sees it; search adds each pair of
neighbours, as Lucene's analyzer for these languages does.
"""

import re
import unicodedata

import regex

_SCRIPTS = "Han Hiragana Katakana Bopomofo Hangul Thai Lao Khmer Myanmar Tibetan Javanese Balinese Tai_Tham Yi".split()
_EXTENDED = "".join(rf"\p{{Script_Extensions={script}}}" for script in _SCRIPTS)
_UNSPACED = rf"[{_EXTENDED}]--\p{{Script=Inherited}}"  # accents of any script, which some of these use too
_LETTERS = r"\p{L}\p{M}\p{N}"
# A run of characters written without spaces, a word, or a symbol such as a currency or an emoji.
_CHARACTERS, _SPACED = rf"(?:[[{_UNSPACED}]&&[{_LETTERS}]]\p{{M}}*)+", rf"[[{_LETTERS}]--[{_UNSPACED}]]+"
_RUN = regex.compile(rf"(?V1)(?P<run>{_CHARACTERS})|{_SPACED}|[\p{{S}}--\p{{ASCII}}]")
_IS_UNSPACED = regex.compile(rf"(?V1){_CHARACTERS}")
# Other text has words of letters and digits alone, which a simpler pattern finds faster.
_NEEDS_RUNS = regex.compile(rf"(?V1)[\p{{M}}[\p{{S}}--\p{{ASCII}}][{_UNSPACED}]]")
_WORD = re.compile(r"[^\W_]+")
_CHARACTER = regex.compile(r"\X")
_DIGIT = regex.compile(r"(?V1)[\p{Nd}--[0-9]]")
_MARK_FLOOD = regex.compile(r"(\p{M}{30})\p{M}+")  # more marks on one letter than any writing has
# What separates words: apostrophes that are letters, trademark signs (they would become letters), zero-width spaces.
_NO_WORD = re.compile(r"[\u02bb\u02bc\u2122\u2120\u200b]")
# Invisible characters; vowel signs and the like that writers of Arabic and Hebrew mostly leave out; stress marks on
# Cyrillic vowels; the dot that a Turkish capital i keeps when it becomes small.
_MAYBE_OPTIONAL = regex.compile(
    r"[\p{Cf}\u0300\u0301\u0307\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]"
)
_OPTIONAL = regex.compile(
    r"(?V1)[\p{Cf}\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed]"
    r"|(?<=[аеиоуыэюяіє]\u0308?)[\u0300\u0301]|(?<=i)\u0307"
)
# Letters that Arabic and Persian keyboards write differently.
_VARIANTS = str.maketrans("\u0649\u06cc\u06a9", "\u064a\u064a\u0643")


def _has(characters: regex.Pattern, text: str) -> bool:
    """Whether one of the characters is in a text; each different one is looked at once."""
    return characters.search("".join(set(text))) is not None


def fold(text: str) -> str:
    """Text with everything unified that makes no difference between words."""
    if text.isascii():
        return text.lower()
    text = _MARK_FLOOD.sub(r"\1", _NO_WORD.sub(" ", text))  # ordering them takes quadratic time
    text = unicodedata.normalize("NFKD", text).casefold()
    if _has(_MAYBE_OPTIONAL, text):
        text = _OPTIONAL.sub("", text)
    text = unicodedata.normalize("NFKC", text)
    if _has(_DIGIT, text):
        text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit.group())), text)
    return text.translate(_VARIANTS)


def _is_simple(text: str) -> bool:
    """Whether all words of a folded text are letters and digits between others."""
    return text.isascii() or not _has(_NEEDS_RUNS, text)


def runs(text: str) -> list[list[str]]:
    """The words of a text, those that are written without spaces between them in one list."""
    text = fold(text)
    if _is_simple(text):
        return [[word] for word in _WORD.findall(text)]
    return [_CHARACTER.findall(found.group()) if found["run"] else [found.group()] for found in _RUN.finditer(text)]


def words(text: str) -> list[str]:
    """The words of a text in order."""
    return [word for run in runs(text) for word in run]


def terms(text: str) -> list[str]:
    """What is searched for: words, and the pairs of neighbours that are written without a space between them."""
    text, found = fold(text), []
    if _is_simple(text):
        return _WORD.findall(text)
    for run in runs(text):
        found += run
        found += map("".join, zip(run, run[1:], strict=False))
    return found


def spans(text: str) -> list[tuple[int, int]]:
    """Find each word of a text: positions [start, end)."""
    found = []
    for run in _RUN.finditer(text):
        if run["run"]:
            found += (c.span() for c in _CHARACTER.finditer(text, *run.span()))
        else:
            found.append(run.span())
    return found


def pieces(text: str) -> list[str]:
    """Split a text into pieces of one word each, with what follows it; joined they are the text."""
    starts = [start for start, _ in spans(text)]
    return (
        [text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]
        if starts
        else [text] * bool(text.strip())
    )


def is_unspaced(text: str) -> bool:
    """Whether all of a text is in scripts whose words are characters."""
    return _IS_UNSPACED.fullmatch(text) is not None


def pattern(*parts: str) -> regex.Pattern:
    """A pattern that finds any of some texts as complete words, the longest first, in upper or lower case."""

    def complete(part: str) -> str:
        before = "" if is_unspaced(part[:1]) else rf"(?<![{_LETTERS}_])"
        after = "" if is_unspaced(part[-1:]) else rf"(?![{_LETTERS}_])"
        return before + regex.escape(part, literal_spaces=True) + after

    return regex.compile("|".join(map(complete, sorted(parts, key=len, reverse=True))), regex.IGNORECASE)


def contains(text: str, part: str) -> bool:
    """Whether a text contains the words of a part, one after another; False for a part without words."""
    wanted = words(part)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(words(text))} "
