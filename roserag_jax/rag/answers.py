"""Answers: finding one in a response, and the official HotPotQA measure of it.

Exact match, F1 and normalisation follow `hotpot_evaluate_v1.py` of the HotPotQA release, its corners included: two
strings that are empty after normalisation match exactly but have F1 0; an answer of yes, no or noanswer has F1 0
against anything but itself; hyphens are deleted, so that they join words.
"""

import collections
import re
import string

from roserag_jax.rag.prompts import THINK_END, THINK_START

_ANSWER = re.compile(
    r"(?:^[\s*#>_]*|(?<=[.!?] ))(?:the )?(?:final )?answer(?: is)?[\s*_]*:[\s*_]*(.*)$", re.IGNORECASE | re.MULTILINE
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalize(text: str) -> str:
    """Lower-case, drop punctuation and articles, squeeze white space."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, golden: list[str]) -> float:
    """1.0 if the prediction equals any golden answer after normalisation."""
    return float(any(normalize(prediction) == normalize(answer) for answer in golden))


def f1(prediction: str, golden: list[str]) -> float:
    """Token F1, the best over the golden answers."""
    return max(_f1(normalize(prediction), normalize(answer)) for answer in golden)


def _f1(prediction: str, answer: str) -> float:
    closed = ("yes", "no", "noanswer")
    if prediction != answer and (prediction in closed or answer in closed):
        return 0.0
    ours, theirs = prediction.split(), answer.split()
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def contains(prediction: str, golden: list[str]) -> float:
    """1.0 if the normalised prediction contains any golden answer as a run of whole words."""
    padded = f" {normalize(prediction)} "
    return float(any(f" {normalize(answer)} " in padded for answer in golden))


def holds(passage: dict, golden: list[str]) -> bool:
    """Whether a passage's title and text contain any golden answer."""
    return bool(contains(f"{passage['title']} {passage['text']}", golden))


def closed(answer: str) -> bool:
    """Whether an answer is yes or no."""
    return normalize(answer) in ("yes", "no")


def yes_no(text: str) -> bool | None:
    """The truth value that an answer begins with (yes, no, true, false); None if it begins with neither."""
    first = normalize(text).partition(" ")[0]
    return {"yes": True, "true": True, "no": False, "false": False}.get(first)


def yes_no_accuracy(prediction: str, golden: list[str]) -> float | None:
    """StrategyQA's accuracy: 1.0 if the truth values are equal; None if the question is not one of yes or no."""
    if not closed(golden[0]):
        return None
    return float(yes_no(prediction) == yes_no(golden[0]))


def parse(response: str, thinking: bool = False) -> tuple[str, str, bool]:
    """Split a response into `(rationale, answer, parsed)` at its first line or sentence that begins with 'Answer:'.

    Without one `parsed` is False, the rationale is the complete response and the answer its last line, so that a
    model that simply gives the answer is not counted wrong for its output format. Thoughts (`<think>...</think>`)
    are neither; a response that ends inside them has no answer.

    Args:
      thinking: whether the prompt ended inside a block of thoughts.
    """
    _, end, behind = response.rpartition(THINK_END)
    response = "" if thinking and not end else behind.partition(THINK_START)[0]
    found = _ANSWER.search(response)
    if found and found.group(1).strip():
        return response[: found.start()].strip(), _clean(found.group(1)), True
    lines = [line for line in response.strip().splitlines() if line.strip()]
    return response.strip(), _clean(lines[-1]) if lines else "", False


def _clean(answer: str) -> str:
    return answer.strip().strip("*_`\"' ").removesuffix(".").strip()


def until(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """What stands before the first of the texts that end a response, and whether one was there."""
    end = min((at for at in map(text.find, stop) if at >= 0), default=None)
    return text[:end], end is not None


def ending(tokenizer, stop: tuple[str, ...]):
    """A function that tells whether a response's tokens hold one of the texts that end it; None if there are none."""
    return (lambda tokens: until(tokenizer.decode(tokens), stop)[1]) if stop else None
