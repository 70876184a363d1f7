"""Labels: what says which of a question's candidates are right.

RoseRAG (arXiv 2502.10993) compares answers with golden ones, and leaves open what to do without them. A label source
judges a question's candidates in another way: by the answer that most plain samples give, by a reward model, or by
scores made elsewhere. To add one, add an entry to `LABELS`; the option's choices, its checks and its help follow.
"""

import collections
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from roserag_jax.errors import UserError
from roserag_jax.rag import answers

GOLD, VOTE = "gold", "vote"
_BINS = (0.25, 0.5, 0.75)  # upper edges of the bins of agreement below full agreement


class LabelSource(NamedTuple):
    """A way to tell right candidates from wrong ones.

    Attributes:
      help: what says that a candidate is right, for the list of options.
      hint: the answer that the guided prompt shows: GOLD, VOTE, or '' where there is none.
      judge: gets a row of `candidates.jsonl`, `config.select` and the measure; returns the row's candidates with
        `correct` true, false, or None where nothing is known.
      needs: options of `select` that must be set.
      only: other options of `select` that mean something with this source, and with others that name them, alone.
    """

    help: str
    hint: str
    judge: Callable[[dict, Any, answers.Measure], list[dict]]
    needs: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


def judge_by_answer(row: dict, options, measure: answers.Measure) -> list[dict]:
    """Candidates of a row, correct where the answer equals one of `golden_answers`, or contains it (`match`)."""
    if not (golden := row["golden_answers"]):
        return [{**c, "correct": None} for c in row["candidates"]]
    verdict = {"em": measure.exact_match, "contains": answers.contains}[options.match]
    return [{**c, "correct": bool(verdict(c["answer"], golden))} for c in row["candidates"]]


def judge_by_reward(row: dict, options, measure: answers.Measure) -> list[dict]:
    """Candidates of a row, correct where the reward is above the threshold, and None near it or without a reward."""
    rewards = [c.get("reward") for c in row["candidates"]]
    known = [reward for reward in rewards if reward is not None]
    # Models trained on comparisons know differences within a prompt; what they add to all its candidates is arbitrary.
    threshold = options.reward_threshold + (statistics.fmean(known) if options.reward_relative and known else 0.0)
    high, low = threshold + options.reward_margin, threshold - options.reward_margin

    def verdict(reward: float | None) -> bool | None:
        if reward is None:
            return None
        if reward >= high:
            return True
        return False if reward <= low else None

    return [{**c, "correct": verdict(reward)} for c, reward in zip(row["candidates"], rewards, strict=True)]


def check_answer_line(config) -> None:
    """Check that labels which compare answers get an answer line to compare.

    Raises:
      UserError: naming the option and what to do.
    """
    if config.prompt.answer_line or config.data.pairs:
        return
    if LABELS[config.select.labels].hint:
        judges = " or ".join(name for name, source in LABELS.items() if not source.hint)
        raise UserError(
            f"config.select.labels={config.select.labels!r} compares short answers, and with "
            f"config.prompt.answer_line=False there are none; judge the texts by {judges}."
        )
    if config.generate.answer == "sampled":
        raise UserError(
            "config.generate.answer='sampled': with config.prompt.answer_line=False there is no answer; leave it out."
        )


_OF_REWARDS = ("reward_threshold", "reward_margin", "reward_relative")

LABELS = {
    "gold": LabelSource("the golden answers", GOLD, judge_by_answer, only=("match",)),
    "self_consistency": LabelSource(
        "the answer that most of a question's plain samples give", VOTE, judge_by_answer, only=("agreement", "match")
    ),
    "reward": LabelSource("a reward model", "", judge_by_reward, needs=("reward_model",), only=_OF_REWARDS),
    "scores": LabelSource("scores made elsewhere", "", judge_by_reward, needs=("scores",), only=_OF_REWARDS),
}


class Vote(NamedTuple):
    """What the samples of a question agree on.

    Attributes:
      answer: the answer of most samples as most of them write it; None where there is none or two have as many.
      votes: how many samples give it (or the most frequent one).
      samples: how many samples were asked, those without an answer included.
    """

    answer: str | None
    votes: int
    samples: int

    @property
    def share(self) -> float:
        """The fraction of the samples that give the answer."""
        return self.votes / self.samples if self.samples else 0.0


def vote(candidates: list[dict], samples: int, measure: answers.Measure = answers.HOTPOTQA) -> Vote:
    """Find the answer that most samples give, after normalization; an answer that normalizes to nothing is none.

    Args:
      candidates: each with its `answer` and how many samples said it, `count`.
      samples: how many samples were drawn, those that became no candidate included.
    """
    counts: collections.Counter[str] = collections.Counter()
    spellings: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for candidate in candidates:
        if normal := measure.normalize(candidate["answer"]):
            counts[normal] += candidate["count"]
            spellings[normal][candidate["answer"]] += candidate["count"]
    if not counts:
        return Vote(None, 0, samples)
    (winner, most), *others = counts.most_common(2)
    if others and others[0][1] == most:
        return Vote(None, most, samples)
    return Vote(spellings[winner].most_common(1)[0][0], most, samples)


def vote_of_row(row: dict, measure: answers.Measure = answers.HOTPOTQA) -> Vote:
    """The vote of a question's row of `votes.jsonl`."""
    # Each sample became a candidate, or was dropped for one reason.
    return vote(row["candidates"], len(row["candidates"]) + sum(row["dropped"].values()), measure)


def label_of(found: Vote, agreement: float) -> dict:
    """A question's `label`: `{answer, votes, samples, dropped?}`; `dropped` says why it has no pseudo-answer."""
    label = {"answer": found.answer, "votes": found.votes, "samples": found.samples}
    if found.answer is None:
        return label | {"dropped": "no majority"}
    return label if found.share >= agreement else label | {"dropped": "low agreement"}


def join_votes(row: dict, guided: dict | None, label: dict, measure: answers.Measure) -> dict:
    """A row of `candidates.jsonl` from the plain candidates that voted and the guided ones that the answer led to.

    Args:
      row: the question's row of `votes.jsonl`.
      guided: the question's row of guided candidates; None where no pseudo-answer is kept.
    """
    golden = [] if "dropped" in label else [label["answer"]]
    of_guided = guided["candidates"] if guided else []
    known = {(c["rationale"], c["answer"]) for c in of_guided}
    plain = [c for c in row["candidates"] if (c["rationale"], c["answer"]) not in known]
    correct = lambda c: bool(measure.exact_match(c["answer"], golden)) if golden else None
    dropped = collections.Counter(row["dropped"]) + collections.Counter(guided["dropped"] if guided else {})
    if repeated := len(row["candidates"]) - len(plain):
        dropped["repeated"] += repeated
    return row | {
        "golden_answers": golden,
        "label": label,
        "candidates": of_guided + [c | {"correct": correct(c)} for c in plain],
        "dropped": dict(dropped),
    }


def with_rewards(rows: list[dict], rewards: list[list[float | None]]) -> list[dict]:
    """Rows whose candidates have their `reward`."""
    join = lambda row, found: [{**c, "reward": r} for c, r in zip(row["candidates"], found, strict=True)]
    return [{**row, "candidates": join(row, found)} for row, found in zip(rows, rewards, strict=True)]


def reward_summary(rows: list[dict], options, measure: answers.Measure = answers.HOTPOTQA) -> str:
    """How rewards lie about the threshold, and, where golden answers are known, how often they say the same."""
    judged = [(row, c) for row in rows for c in judge_by_reward(row, options, measure)]
    above, below = ([pair for pair in judged if pair[1]["correct"] is side] for side in (True, False))
    rewards = [c["reward"] for _, c in judged if c["reward"] is not None]
    if not rewards:
        return "  no candidate has a reward"
    low, middle, high = statistics.quantiles(rewards, n=4, method="inclusive") if len(rewards) > 1 else rewards * 3
    line = (
        f"  rewards: quartiles {low:.3g}/{middle:.3g}/{high:.3g}; {len(above)} above the threshold, {len(below)} below"
    )
    for name, side in (("above", above), ("below", below)):
        known = [(row["golden_answers"], c["answer"]) for row, c in side if row["golden_answers"] and c["answer"]]
        right = [measure.exact_match(answer, golden) for golden, answer in known]
        if right:
            line += f"; {name}, {statistics.fmean(right):.0%} of {len(right)} have a golden answer"
    return line


def agreement_table(
    rows: list[dict], golden_answers: Sequence[list[str]], measure: answers.Measure = answers.HOTPOTQA
) -> tuple[list[str], list[list[str]]]:
    """How often the vote is right, by how many samples agree: header and rows of a table.

    Args:
      rows: of `candidates.jsonl`, with their `label`.
      golden_answers: of each row, empty where they are not known; these rows have no accuracy.
    """
    bins: dict[str, list[tuple[bool, float | None]]] = {name: [] for name in _bin_names()}
    ties = 0
    for row, golden in zip(rows, golden_answers, strict=True):
        label = row["label"]
        if label["answer"] is None:
            ties += 1
            continue
        right = measure.exact_match(label["answer"], golden) if golden else None
        bins[_bin_of(label["votes"] / label["samples"])].append(("dropped" not in label, right))
    table = [_agreement_row(name, found) for name, found in bins.items() if found]
    table.append(_agreement_row("all", [each for found in bins.values() for each in found]))
    if ties:
        table.append(["no majority", str(ties), "0", "", ""])
    return ["agreement", "questions", "kept", "accuracy", "of those kept"], table


def _bin_names() -> list[str]:
    edges = [0.0, *_BINS, 1.0]
    return [f"{low:.0%} to {high:.0%}" for low, high in zip(edges, edges[1:], strict=False)] + ["100%"]


def _bin_of(share: float) -> str:
    """The bin of a share; an edge belongs to the bin above it."""
    return _bin_names()[sum(share >= edge for edge in (*_BINS, 1.0))]


def _agreement_row(name: str, found: list[tuple[bool, float | None]]) -> list[str]:
    def accuracy(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.fmean(known):.0%} of {len(known)}" if known else ""

    kept = [right for is_kept, right in found if is_kept]
    return [name, str(len(found)), str(len(kept)), accuracy([right for _, right in found]), accuracy(kept)]
