"""Stated noise: what is done to the K passages of a question before they are shown, to see what the answer survives.

    none             the first K passages
    random<n>        n passages on other things added
    same_topic<n>    n passages added that BM25 finds for the question (hard negatives)
    counterfactual<n>  n passages added that state a wrong answer
    no_gold          the first K passages that are not gold
    shuffled         the first K passages in another order

Added passages come from a pool (a corpus, or the contexts of all questions), stand at drawn places among the K, which
keep their order, are none of the question's own that are flagged as gold, and never hold a golden answer, but for a
counterfactual statement that quotes a question that names it. Every draw is a function of (seed, noise, question id)
alone.
"""

import itertools
import random
import re
from collections.abc import Callable

from roserag_jax.errors import UserError
from roserag_jax.rag import answers
from roserag_jax.retrieval.bm25 import BM25

_COUNTED = re.compile(r"(random|same_topic|counterfactual)([1-9]\d*)")
_PLAIN = ("none", "no_gold", "shuffled")


def parse(name: str) -> tuple[str, int]:
    """A condition's kind and how many passages it adds.

    Raises:
      ValueError: there is no such condition.
    """
    if found := _COUNTED.fullmatch(name):
        return found.group(1), int(found.group(2))
    if name in _PLAIN:
        return name, 0
    raise ValueError(f"{name!r} is none of {', '.join(_PLAIN)}, random<n>, same_topic<n>, counterfactual<n>")


class Noise:
    """Applies one condition to rows.

    Args:
      name: a condition, as above.
      rows: all questions that are asked; their golden answers are where wrong ones come from.
      pool: passages `{title, text}` to add.
      index: makes the pool's index, where there is one already; it is asked for only if it is needed.
    """

    def __init__(self, name: str, seed: int, rows: list[dict], pool: list[dict], index: Callable | None = None):
        self.kind, self.count = parse(name)
        self.name, self.seed, self.pool = name, seed, pool
        self.answers = sorted({row["golden_answers"][0] for row in rows})
        self.index = (index() if index else BM25(pool)) if self.kind == "same_topic" else None

    def passages(self, row: dict, K: int) -> list[dict]:
        """What is shown for a row instead of its first K contexts.

        Raises:
          UserError: the row does not say which of its passages are gold, or the pool is too small.
        """
        rng = random.Random(f"{self.seed}/{self.name}/{row['id']}")
        contexts = row.get("contexts", [])
        if self.kind == "no_gold":
            if any("is_supporting" not in c for c in contexts):
                raise UserError(f"Row {row['id']!r}: no_gold needs is_supporting of every passage.")
            return [c for c in contexts if not c["is_supporting"]][:K]
        shown = list(contexts[:K])
        if self.kind == "shuffled":
            rng.shuffle(shown)
        elif self.kind == "counterfactual":
            shown = _inserted(shown, self._claims(row, rng), rng)
        elif self.count:
            shown = _inserted(shown, self._others(row, shown, rng), rng)
        return shown

    def _others(self, row: dict, shown: list[dict], rng: random.Random) -> list[dict]:
        gold = [c for c in row.get("contexts", []) if c.get("is_supporting")]
        own = {(c["title"], c["text"]) for c in (*shown, *gold)}
        golden = [a for a in row["golden_answers"] if not answers.closed(a)]
        fits = lambda p: (p["title"], p["text"]) not in own and not answers.holds(p, golden)
        if self.index:
            found = self.index.search([row["question"]], self.count + len(own) + 50)[0]
        else:
            size = len(self.pool)
            found = (self.pool[i] for i in rng.sample(range(size), min(size, 20 * self.count + len(own) + 50)))
        fitting = list(itertools.islice((p for p in found if fits(p)), self.count))
        if len(fitting) < self.count:
            raise UserError(
                f"Row {row['id']!r}: {self.name} finds only {len(fitting)} passages; name a corpus in "
                "config.retrieve.corpus or add fewer."
            )
        return [{"title": p["title"], "text": p["text"], "is_supporting": False} for p in fitting]

    def _claims(self, row: dict, rng: random.Random) -> list[dict]:
        """Copies of passages that hold a golden answer with a wrong one in its place, else a bare statement.

        The wrong answer is another question's, a number for a number; to yes it is no.
        """
        golden = row["golden_answers"]
        closed = answers.closed(golden[0])
        if closed:
            wrong = ["no" if answers.normalize(golden[0]) == "yes" else "yes"]
        else:
            alike = lambda a: any(ch.isdigit() for ch in a) == any(ch.isdigit() for ch in golden[0])
            # Neither may be a part of the other: Paris, Texas is no wrong answer to Paris.
            right = lambda a: answers.contains(a, golden) or any(answers.contains(g, [a]) for g in golden)
            others = [a for a in self.answers if not answers.closed(a) and not right(a)]
            wrong = [a for a in others if alike(a)] or others
            if not wrong:
                raise UserError(f"{self.name} takes wrong answers from other questions; there are none.")
            rng.shuffle(wrong)
        any_golden = "|".join(map(re.escape, sorted(golden, key=len, reverse=True)))
        word = re.compile(rf"(?<!\w)(?:{any_golden})(?!\w)", re.IGNORECASE)
        put = lambda said, passage: {part: word.sub(lambda _: said, passage[part]) for part in ("title", "text")}
        holding = [] if closed else [c for c in row.get("contexts", []) if word.search(c["text"])]
        # Not those that still hold one, in another spelling.
        holding = [c for c in holding if not answers.holds(put("", c), golden)]
        claims = []
        for i in range(self.count):
            said = wrong[i % len(wrong)]
            if holding:
                title, text = put(said, holding[i % len(holding)]).values()
            else:
                title, text = "", f'The answer to the question "{row["question"]}" is {said}.'
            claims.append({"title": title, "text": text, "is_supporting": False})
        return claims


def _inserted(shown: list[dict], added: list[dict], rng: random.Random) -> list[dict]:
    """The added passages at drawn places among the shown ones, which keep their order."""
    total = len(shown) + len(added)
    places = set(rng.sample(range(total), len(added)))
    shown, added = iter(shown), iter(added)
    return [next(added) if i in places else next(shown) for i in range(total)]
