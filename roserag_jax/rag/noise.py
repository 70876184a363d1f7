"""Noise conditions: what is done to the K passages of a question before they are shown, to see what answers survive.

`CONDITIONS` lists them. Added passages come from a pool (a corpus, or the contexts of all questions), come at
drawn places among the K, which keep their order. They are never passages of the question that are flagged as gold, and
never contain a golden answer, except a counterfactual statement that quotes a question that names it. Every draw is a
function of (seed, condition, question id) alone.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from roserag_jax.errors import UserError
from roserag_jax.rag import answers, words


class Condition(NamedTuple):
    """A kind of noise; to add one, write its function and add an entry to `CONDITIONS`.

    Attributes:
      help: what is shown.
      passages: the function `(noise, row, K, rng)` that returns the passages to show.
      parameter: what the number behind its name is: 'n' passages, 'p' percent, or '' where there is none.
    """

    help: str
    passages: Callable[["Noise", dict, int, random.Random], list[dict]]
    parameter: str = ""


def parse(name: str) -> tuple[str, int]:
    """A condition's kind and its number, 0 where it has none.

    Raises:
      ValueError: there is no such condition.
    """
    kind, number = re.fullmatch(r"(.*?)([1-9][0-9]{0,3})?", name, re.DOTALL).groups()
    condition = CONDITIONS.get(kind)
    if condition and bool(number) == bool(condition.parameter) and (condition.parameter != "p" or int(number) <= 100):
        return kind, int(number or 0)
    raise ValueError(f"{name!r} is none of {', '.join(map(_written, CONDITIONS))}")


def _written(kind: str) -> str:
    parameter = CONDITIONS[kind].parameter
    return f"{kind}<{parameter}>" if parameter else kind


def describe() -> str:
    """All conditions and what they show, as a phrase."""
    return "; ".join(f"{_written(kind)} ({condition.help})" for kind, condition in CONDITIONS.items())


class Noise:
    """Applies one condition to rows.

    Args:
      name: a condition, with its number.
      rows: all questions; wrong answers are golden answers of others.
      pool: passages `{title, text}` to add.
      index: returns what searches the pool, with `search(queries, k)`; called only if the condition searches.
    """

    def __init__(self, name: str, seed: int, rows: list[dict], pool: list[dict], index: Callable | None = None):
        self.kind, self.number = parse(name)
        self.name, self.seed, self.pool = name, seed, pool
        self.answers = sorted({row["golden_answers"][0] for row in rows})
        self._make_index, self._index = index, None

    def passages(self, row: dict, K: int) -> list[dict]:
        """The passages that are shown for a row instead of its first K.

        Raises:
          UserError: the row does not say which of its passages are gold, or the pool is too small.
        """
        rng = random.Random(f"{self.seed}/{self.name}/{row['id']}")
        return CONDITIONS[self.kind].passages(self, row, K, rng)

    @property
    def index(self):
        """What searches the pool, made when it is first needed."""
        self._index = self._index or self._make_index()
        return self._index

    def others(self, row: dict, shown: list[dict], found: Iterable[dict], count: int) -> list[dict]:
        """The first `count` of some passages that are not shown, not gold, and contain no golden answer.

        Raises:
          UserError: there are fewer.
        """
        own = _own(row, shown)
        golden = [a for a in row["golden_answers"] if not answers.is_yes_no(a)]
        fits = lambda p: _key(p) not in own and not answers.is_answered_by(p, golden)
        fitting = list(itertools.islice((p for p in found if fits(p)), count))
        if len(fitting) < count:
            raise UserError(
                f"Row {row['id']!r}: {self.name} finds only {len(fitting)} passages; name a corpus in "
                "config.retrieve.corpus or add fewer."
            )
        return [{"title": p["title"], "text": p["text"], "is_supporting": False} for p in fitting]

    def hard_negatives(self, row: dict, shown: list[dict], count: int) -> list[dict]:
        """Passages that BM25 finds for the question and that do not answer it."""
        if not count:
            return []
        most = count + len(_own(row, shown)) + 50
        return self.others(row, shown, self.index.search([row["question"]], most)[0], count)


def _key(passage: dict) -> tuple[str, str]:
    return passage["title"], passage["text"]


def _gold(row: dict) -> list[dict]:
    return [c for c in row.get("contexts", []) if c.get("is_supporting")]


def _own(row: dict, shown: list[dict]) -> set[tuple[str, str]]:
    """The passages that are shown or gold, which are not added."""
    return {_key(c) for c in shown + _gold(row)}


def _first(row: dict, K: int) -> list[dict]:
    return list(row.get("contexts", [])[:K])


def _check_flags(noise: Noise, row: dict) -> None:
    if any("is_supporting" not in c for c in row.get("contexts", [])):
        raise UserError(f"Row {row['id']!r}: {noise.kind} needs is_supporting of every passage.")


def _none(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    return _first(row, K)


def _no_gold(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    _check_flags(noise, row)
    return [c for c in row.get("contexts", []) if not c["is_supporting"]][:K]


def _shuffled(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    shown = _first(row, K)
    rng.shuffle(shown)
    return shown


def _random(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    shown, size = _first(row, K), len(noise.pool)
    most = 20 * noise.number + len(_own(row, shown)) + 50
    drawn = (noise.pool[i] for i in rng.sample(range(size), min(size, most)))
    return _inserted(shown, noise.others(row, shown, drawn, noise.number), rng)


def _same_topic(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    shown = _first(row, K)
    return _inserted(shown, noise.hard_negatives(row, shown, noise.number), rng)


def _swapped(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    _check_flags(noise, row)
    shown = _first(row, K)
    gold = [i for i, c in enumerate(shown) if c["is_supporting"]]
    places = rng.sample(gold, min(noise.number, len(gold)))
    for place, negative in zip(sorted(places), noise.hard_negatives(row, shown, len(places)), strict=True):
        shown[place] = negative
    return shown


def _weak(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    asked = words.words(row["question"])
    kept = sorted(rng.sample(range(len(asked)), (len(asked) + 1) // 2))
    found = noise.index.search([" ".join(asked[i] for i in kept)], K)[0]
    if not (gold := {_key(c) for c in _gold(row)}):
        return found
    return [{**c, "is_supporting": _key(c) in gold} for c in found]


def _typos(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    def mistyped(word: str) -> str:
        at = rng.randrange(max(1, len(word) - 1))
        swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        return rng.choice((word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], swapped))

    def mistype(text: str) -> str:
        made, behind = "", 0
        for start, end in words.spans(text):
            word = text[start:end]
            made += text[behind:start] + (mistyped(word) if rng.random() < noise.number / 100 else word)
            behind = end
        return made + text[behind:]

    return [{**c, "text": mistype(c["text"])} for c in _first(row, K)]


def _truncated(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    def truncate(text: str) -> str:
        places = words.spans(text)
        kept = len(places) * (100 - noise.number) // 100
        return text[: places[kept - 1][1]] if kept else ""

    return [{**c, "text": truncate(c["text"])} for c in _first(row, K)]


def _counterfactual(noise: Noise, row: dict, K: int, rng: random.Random) -> list[dict]:
    """Add copies of passages that contain a golden answer with a wrong one in its place, else a bare statement."""
    golden, wrong = row["golden_answers"], _wrong_answers(noise, row, rng)
    answer = words.pattern(*golden)
    replaced = lambda text, passage: {part: answer.sub(lambda _: text, passage[part]) for part in ("title", "text")}
    stating = [] if answers.is_yes_no(golden[0]) else [c for c in row.get("contexts", []) if answer.search(c["text"])]
    # Not those that still contain one, in another spelling.
    stating = [c for c in stating if not answers.is_answered_by(replaced(" ", c), golden)]
    claims = []
    for i in range(noise.number):
        claim = wrong[i % len(wrong)]
        if stating:
            title, text = replaced(claim, stating[i % len(stating)]).values()
        else:
            title, text = "", f'The answer to the question "{row["question"]}" is {claim}.'
        claims.append({"title": title, "text": text, "is_supporting": False})
    return _inserted(_first(row, K), claims, rng)


def _wrong_answers(noise: Noise, row: dict, rng: random.Random) -> list[str]:
    """Answers of other questions in drawn order, numbers if the golden answer is one; to yes it is no."""
    golden = row["golden_answers"]
    if answers.is_yes_no(golden[0]):
        return ["no" if answers.normalize(golden[0]) == "yes" else "yes"]
    is_alike = lambda a: any(ch.isdigit() for ch in a) == any(ch.isdigit() for ch in golden[0])
    # Neither may be a part of the other: Paris, Texas is no wrong answer to Paris.
    is_right = lambda a: answers.contains(a, golden) or any(answers.contains(g, [a]) for g in golden)
    others = [a for a in noise.answers if not answers.is_yes_no(a) and not is_right(a)]
    wrong = [a for a in others if is_alike(a)] or others
    if not wrong:
        raise UserError(f"{noise.name} takes wrong answers from other questions; there are none.")
    rng.shuffle(wrong)
    return wrong


def _inserted(shown: list[dict], added: list[dict], rng: random.Random) -> list[dict]:
    """Insert the added passages at drawn places among the shown ones, which keep their order."""
    total = len(shown) + len(added)
    places = set(rng.sample(range(total), len(added)))
    shown, added = iter(shown), iter(added)
    return [next(added) if i in places else next(shown) for i in range(total)]


CONDITIONS = {
    "none": Condition("the first K passages", _none),
    "shuffled": Condition("the same in a drawn order", _shuffled),
    "no_gold": Condition("the first K that are not gold", _no_gold),
    "random": Condition("n passages on other things added", _random, "n"),
    "same_topic": Condition("n added that BM25 finds for the question: hard negatives", _same_topic, "n"),
    "counterfactual": Condition("n added that state a wrong answer", _counterfactual, "n"),
    "swapped": Condition("n of the gold ones replaced by hard negatives", _swapped, "n"),
    "weak": Condition("the K that BM25 finds with half of the question's words", _weak),
    "typos": Condition("p percent of their words mistyped", _typos, "p"),
    "truncated": Condition("their last p percent of words missing", _truncated, "p"),
}
