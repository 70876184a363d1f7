"""Answers: finding one in a response, and measuring it against the golden ones.

Exact match, F1 and normalization are those of published scripts, edge cases included. HotPotQA's
(`hotpot_evaluate_v1.py`) is the default: two strings that are empty after normalization match exactly but have F1 0; an
answer of yes, no or noanswer has F1 0 against anything but itself; hyphens are deleted, so that they join words.
MLQA's and MKQA's have articles of many languages, and count single characters where words are not separated by spaces.
"""

import collections
import dataclasses
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from roserag_jax.rag import words
from roserag_jax.rag.chat import THINK_END, THINK_START

_SENTENCE_ENDS = r"(?<=[.!?\u0964\u06d4\u061f] )|(?<=[\u3002\uff0e\uff01\uff1f\uff61])"
_ANSWER = re.compile(
    rf"(?:^[\s*#>_]*|{_SENTENCE_ENDS})(?:the )?(?:final )?answer(?: is)?[\s*_]*[:\uff1a\ufe55\ufe13][\s*_]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u2060\ufeff]")
_PUNCTUATION = set(string.punctuation)
# Articles of languages, from the scripts of MLQA and, where it has more of them, of MKQA; in other languages none.
_MLQA_ARTICLES = {
    "ar": r"\sال^|ال",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "hi": "",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "zh": "",
}
_MKQA_ARTICLES = {
    **{name: _MLQA_ARTICLES[name] for name in ("ar", "de", "en", "es", "vi")},
    "da": r"\b(en|et)\b",
    "fi": r"\b(se|yks|yksi)\b",
    "fr": r"\b(le|la|l'|les|du|de|d'|des|un|une|des)",
    "hu": r"\b(a|az|egy)\b",
    "it": r"\b(il|lo|la|l'|i|gli|le|del|dello|della|dell'|dei|degli|degl'|delle|un'|uno|una|un)",
    "nl": r"\b(de|het|een|des|der|den)\b",
    "no": r"\b(en|et|ei)\b",
    "pt": r"\b(o|a|os|as|um|uma|uns|umas)\b",
    "sv": r"\b(en|ett)\b",
    **dict.fromkeys(("he", "ja", "km", "ko", "ms", "pl", "ru", "th", "tr", "zh_cn", "zh_hk", "zh_tw"), ""),
}


def _normalized(text: str, is_punctuation: Callable[[str], bool], articles: str, split: Callable[[str], list]) -> str:
    """Lower-case, drop punctuation and articles, and put one space between words."""
    text = "".join(c for c in text.lower() if not is_punctuation(c))
    return " ".join(split(re.sub(articles, " ", text) if articles else text))


def normalize(text: str) -> str:
    """HotPotQA's normalization: lower case, no ASCII punctuation, no English articles, single spaces."""
    return _normalized(text, _PUNCTUATION.__contains__, _MLQA_ARTICLES["en"], str.split)


def _hotpotqa(_) -> Callable[[str], str]:
    return normalize


def _mlqa(language: str) -> Callable[[str], str]:
    """MLQA's normalization: punctuation of all scripts, articles of the language, each Chinese character a word."""
    is_punctuation = lambda c: c in _PUNCTUATION or unicodedata.category(c).startswith("P")
    split = (lambda text: re.findall(r"[\u4e00-\u9fa5]|[^\s\u4e00-\u9fa5]+", text)) if language == "zh" else str.split
    return lambda text: _normalized(text, is_punctuation, _MLQA_ARTICLES[language], split)


def _mkqa(language: str) -> Callable[[str], str]:
    """MKQA's normalization: ASCII punctuation, articles of the language, in some languages each character a word."""
    characters = language in ("zh_cn", "zh_hk", "zh_tw", "ja", "th", "km")
    split = (lambda text: [c for c in text if not c.isspace()]) if characters else str.split
    return lambda text: _normalized(text, _PUNCTUATION.__contains__, _MKQA_ARTICLES[language], split)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A published way to compute exact match and F1; add an entry to `METRICS` to add one.

    Attributes:
      help: what it is, for the list of options.
      normalizer: makes the normalization of a language.
      languages: those it is defined for; empty where it has no language.
      closed: answers that have F1 0 against anything but themselves.
      empty_f1: F1 of two answers that are both empty after normalization.
    """

    help: str
    normalizer: Callable[[str], Callable[[str], str]]
    languages: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    empty_f1: float = 0.0


METRICS = {
    "hotpotqa": Metric("HotPotQA's, for English", _hotpotqa, closed=("yes", "no", "noanswer")),
    "mlqa": Metric("MLQA's", _mlqa, tuple(sorted(_MLQA_ARTICLES))),
    "mkqa": Metric("MKQA's", _mkqa, tuple(sorted(_MKQA_ARTICLES)), empty_f1=1.0),
}


class Measure:
    """Exact match and F1 of a metric in a language.

    Raises:
      ValueError: the metric is not defined for the language.
    """

    def __init__(self, metric: str = "hotpotqa", language: str = ""):
        self._metric = METRICS[metric]
        if self._metric.languages and language not in self._metric.languages:
            raise ValueError(f"{metric} is defined for {', '.join(self._metric.languages)}")
        self._normalize = self._metric.normalizer(language)

    def normalize(self, answer: str) -> str:
        """An answer as the measure compares it; empty where nothing of it counts."""
        return self._normalize(answer)

    def exact_match(self, prediction: str, golden: Sequence[str]) -> float:
        """1.0 if the prediction equals any golden answer after normalization."""
        return float(any(self._normalize(prediction) == self._normalize(answer) for answer in golden))

    def f1(self, prediction: str, golden: Sequence[str]) -> float:
        """Token F1, the best over the golden answers."""
        return max(self._f1(self._normalize(prediction), self._normalize(answer)) for answer in golden)

    def _f1(self, prediction: str, answer: str) -> float:
        if prediction != answer and (prediction in self._metric.closed or answer in self._metric.closed):
            return 0.0
        found, wanted = prediction.split(), answer.split()
        if not found and not wanted:
            return self._metric.empty_f1
        same = sum((collections.Counter(found) & collections.Counter(wanted)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(found), same / len(wanted)
        return 2 * precision * recall / (precision + recall)


HOTPOTQA = Measure()


def contains(prediction: str, golden: Sequence[str]) -> float:
    """1.0 if the normalized prediction contains any golden answer as a run of complete words."""
    text = normalize(prediction)
    return float(any(words.contains(text, normalize(answer)) for answer in golden))


def is_answered_by(passage: dict, golden: Sequence[str]) -> bool:
    """Whether a passage's title and text contain any golden answer."""
    return bool(contains(f"{passage['title']} {passage['text']}", golden))


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no."""
    return normalize(answer) in ("yes", "no")


def yes_no(text: str) -> bool | None:
    """The boolean that an answer begins with (yes, no, true, false); None if it begins with neither."""
    first = normalize(text).partition(" ")[0]
    return {"yes": True, "true": True, "no": False, "false": False}.get(first)


def yes_no_accuracy(prediction: str, golden: list[str]) -> float | None:
    """StrategyQA's accuracy: 1.0 if the booleans are equal; None if it is not a yes/no question."""
    if not is_yes_no(golden[0]):
        return None
    return float(yes_no(prediction) == yes_no(golden[0]))


def parse(response: str, thinking: bool = False, answer_line: bool = True) -> tuple[str, str, bool]:
    """Split a response into `(rationale, answer, parsed)` at its first line or sentence that begins with 'Answer:'.

    Without one `parsed` is False, the rationale is the complete response and the answer its last line, so that a
    model that simply gives the answer is not counted wrong for its output format. Thoughts (`<think>...</think>`)
    are neither; a response that ends inside them has no answer.

    Args:
      thinking: whether the prompt ended inside a block of thoughts.
      answer_line: False if the prompt asks for no answer line: the answer is the complete response then, without a
        rationale, and parsed if there is any.
    """
    _, end, behind = response.rpartition(THINK_END)
    response = "" if thinking and not end else _INVISIBLE.sub("", behind.partition(THINK_START)[0])
    if not answer_line:
        return "", response.strip(), bool(response.strip())
    found = _ANSWER.search(response)
    if found and found.group(1).strip():
        return response[: found.start()].strip(), _clean(found.group(1)), True
    lines = [line for line in response.strip().splitlines() if line.strip()]
    return response.strip(), _clean(lines[-1]) if lines else "", False


_QUOTES = "*_`\"' \u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f"
_FULL_STOPS = ".\u3002\uff0e\uff61\u0964\u06d4"


def _clean(answer: str) -> str:
    """An answer without quotation marks, emphasis and a final full stop."""
    answer = answer.strip().strip(_QUOTES)
    return (answer[:-1] if answer.endswith(tuple(_FULL_STOPS)) else answer).strip().strip(_QUOTES)


def until(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    end = min((at for at in map(text.find, stop) if at >= 0), default=None)
    return text[:end], end is not None


def ending(tokenizer, stop: tuple[str, ...]):
    """A function that tells whether a response's tokens contain a stop string; None if there are no stop strings."""
    return (lambda tokens: until(tokenizer.decode(tokens), stop)[1]) if stop else None
