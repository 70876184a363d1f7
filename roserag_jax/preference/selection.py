"""Selection: one (chosen, rejected) pair per question, the hardest by default.

RoseRAG (arXiv 2502.10993), section 3: chosen is the correct rationale that the model is least sure of, rejected the
incorrect one that it is surest of. Confidence is the log-probability under the plain prompt.
"""

import collections
import itertools
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

from roserag_jax.errors import UserError
from roserag_jax.preference.labels import LABELS
from roserag_jax.rag import answers
from roserag_jax.rag.words import is_unspaced, runs, words

# Words of four letters and more that a rationale can have in common with any passage without having read it.
_COMMON = set(
    "about according also answer answered answers because been being both correct final first from given have here "
    "into last more most only other over passage passages question questions relevant said same says short should "
    "since some statement states such than that their them then there therefore these they this thus under very was "
    "were what when where which while with would".split()
)

Picked = list[tuple[dict, dict]]

# Why a question has no pair, and what that means.
REASONS = {
    "no candidate": "no sample became a candidate",
    "all correct": "every candidate is correct, so there is none to reject",
    "none correct": "no candidate reaches the golden answer, so there is none to choose",
    "no evidence": "the correct candidates name nothing that the passages say, so they restate the hint",
    "no support": "no passage shown holds the golden answer",
    "one source only": "guided or plain candidates are missing",
    "no majority": "no answer is that of more samples than any other",
    "low agreement": "fewer samples than config.select.agreement agree on an answer",
    "no reward": "no candidate has a reward, or all are too near to the threshold",
}


class Outcome(NamedTuple):
    """What selection makes of one question's candidates.

    Attributes:
      candidates: all of them, judged.
      right: those that may be chosen.
      wrong: those that may be rejected.
      reason: of `REASONS`, why there is no pair; '' if there is one.
      bare: how many correct ones name nothing that the passages say.
    """

    candidates: list[dict]
    right: list[dict]
    wrong: list[dict]
    reason: str
    bare: int = 0


class Strategy(NamedTuple):
    """A way to choose pairs; `pick` gets correct and incorrect candidates, a confidence, and a random generator."""

    help: str
    pick: Callable[[list[dict], list[dict], Callable[[dict], tuple], random.Random], Picked]


STRATEGIES = {
    "hard": Strategy(
        "the least sure correct and the surest incorrect one",
        lambda right, wrong, sure, _: [(min(right, key=sure), max(wrong, key=sure))],
    ),
    "easy": Strategy("the reverse", lambda right, wrong, sure, _: [(max(right, key=sure), min(wrong, key=sure))]),
    "random": Strategy("any", lambda right, wrong, _, rng: [(rng.choice(right), rng.choice(wrong))]),
    "all": Strategy("every combination", lambda right, wrong, *_: list(itertools.product(right, wrong))),
}


def confidence(candidate: dict, kind: str) -> float:
    """Log-probability of a response, per token ('mean') or in total ('sum')."""
    return candidate["logprob"] / candidate["tokens"] if kind == "mean" else candidate["logprob"]


def evidence(rationales: list[str], golden_answers: list[str], passages: list[dict]) -> list[set[str]]:
    """The different words of the passages that each rationale contains, other than the golden answers' and common ones.

    The guided prompt's hint is "The answer is ...". A rationale that only restates it leads to the right answer,
    because it contains it, and has the lowest log-probability of all, because nothing supports it: hard selection would
    choose it before any real reading. Such a rationale has no word in common with the passages that it did not get from
    the hint, however it is phrased; one that reads them names at least what it reads about.
    """
    golden = {"".join(run) for answer in golden_answers for run in runs(answer)}
    known = set().union(*(_content_words(answer, set()) for answer in golden_answers)) | _COMMON
    read = set().union(*(_content_words(f"{p['title']} {p['text']}", golden) for p in passages)) - known
    return [_content_words(rationale, golden) & read for rationale in rationales]


def hinted_answers(row: dict, options) -> list[str]:
    """The golden answers that a guided prompt of this row shows; none where labels are no answers."""
    return row["golden_answers"] if LABELS[options.labels].hint else []


def _content_words(text: str, golden: set[str]) -> set[str]:
    """Words that say what a text is about.

    Short words do not: those of three letters and less count only as numbers. Where characters are words, a few in a
    row count as one: three of Chinese and Japanese, not all hiragana (endings and particles), the first three of a
    Korean word, eight of the alphabets of Southeast Asia. Golden answers are taken out of such rows first.
    """
    found = set()
    for run in runs(text):
        if not is_unspaced(run[0]):
            found |= {w for w in run if len(w) > 3 or w.isdigit()}
            continue
        joined, korean = "".join(run), "\uac00" <= run[0] <= "\ud7a3"
        for answer in golden:
            joined = joined.partition(answer)[0] if korean else joined.replace(answer, " ")
        size = 3 if joined[:1] >= "\u2e80" else 8
        for row in joined.split():
            pieces = {row[i : i + size] for i in range(1 if korean else len(row)) if len(row) >= i + size}
            found |= {piece for piece in pieces if not all("\u3040" <= c <= "\u309f" for c in piece)}
    return found


def is_supported(golden_answers: list[str], passages: list[dict]) -> bool:
    """Whether a passage contains a golden answer as complete words, or the question is a yes/no question.

    Where none does, a rationale that leads to the answer took it from the hint or made it up.
    """
    return answers.is_yes_no(golden_answers[0]) or any(answers.is_answered_by(p, golden_answers) for p in passages)


def select(
    rows: list[dict],
    passages: dict[str, list[dict]],
    options,
    seed: int,
    measure: answers.Measure = answers.HOTPOTQA,
) -> tuple[list[dict], dict]:
    """Select pairs from candidates, and count what became of questions and candidates.

    Args:
      rows: as `generate` writes them; with rewards as labels, each candidate with its `reward`.
      passages: what was shown for each question, by its id.
      options: `config.select`. Without `rejection` (the paper's ablation) a chosen response is any guided candidate and
        a rejected one any plain candidate, unchecked.

    Returns:
      Pairs `{id, prompt, passage_spans, chosen, rejected, chosen_logprob, rejected_logprob, margin}`; log-probabilities
      are of the given kind and margin is chosen minus rejected. And counts: `{questions: {reason: dropped},
      no_evidence, accepted: {source: [correct, total]}}`.

    Raises:
      UserError: no question has both kinds of candidates.
    """
    pairs, dropped = [], dict.fromkeys(REASONS, 0)
    counts = {"questions": dropped, "no_evidence": 0, "accepted": {}}
    for row in rows:
        found = outcome(row, passages[row["id"]], options, measure)
        for c in found.candidates:
            if c["correct"] is None:
                continue
            tally = counts["accepted"].setdefault(c["source"], [0, 0])
            tally[0] += c["correct"]
            tally[1] += 1
        counts["no_evidence"] += found.bare
        if found.reason:
            dropped[found.reason] += 1
            continue
        sure = lambda c: (confidence(c, options.confidence), c["response"])
        rng = random.Random(f"{seed}/{row['id']}")
        picked = STRATEGIES[options.strategy].pick(found.right, found.wrong, sure, rng)
        pairs += [_pair(row, chosen, rejected, options.confidence) for chosen, rejected in picked]
    if not pairs:
        raise UserError(
            f"No pair survived selection: of {len(rows)} questions {describe(dropped)}. A pair needs a correct and an "
            "incorrect candidate: raise config.generate.guided_samples, plain_samples or temperature, or use "
            "more questions."
        )
    return pairs, counts


def outcome(row: dict, shown: list[dict], options, measure: answers.Measure = answers.HOTPOTQA) -> Outcome:
    """Judge the candidates of a question, and sort out those that may be chosen and rejected.

    Args:
      row: as `generate` writes it.
      shown: the passages that were shown for it.
      options: `config.select`.
    """
    candidates = LABELS[options.labels].judge(row, options, measure)
    if reason := row.get("label", {}).get("dropped"):  # why samples agreed on no answer
        return Outcome(candidates, [], [], reason)
    if not options.rejection:
        guided, plain = ([c for c in candidates if c["source"] == source] for source in ("guided", "plain"))
        reason = "" if guided and plain else "one source only" if candidates else "no candidate"
        return Outcome(candidates, guided, plain, reason)
    hinted = hinted_answers(row, options)
    correct = [c for c in candidates if c["correct"]]
    wrong = [c for c in candidates if c["correct"] is False]
    right, reason = correct, ""
    if options.evidence and shown:
        read = evidence([c["rationale"] for c in correct], hinted, shown)
        right = [c for c, words_read in zip(correct, read, strict=True) if len(words_read) >= options.evidence]
    if not candidates:
        reason = "no candidate"
    elif not correct and not wrong:
        reason = "no reward"
    elif not wrong:
        reason = "all correct"
    elif right and options.supported and not is_supported(hinted, shown):
        reason = "no support"
    elif not right:
        reason = "no evidence" if correct else "none correct"
    return Outcome(candidates, right, wrong, reason, len(correct) - len(right))


def _pair(row: dict, chosen: dict, rejected: dict, kind: str) -> dict:
    high, low = confidence(chosen, kind), confidence(rejected, kind)
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "passage_spans": row.get("passage_spans", []),
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_logprob": round(high, 4),
        "rejected_logprob": round(low, 4),
        "margin": round(high - low, 4),
    }


def dropped_samples(rows: list[dict]) -> str:
    """How many samples became no candidates, by reason, as a phrase; empty where all did."""
    counts = sum((collections.Counter(row["dropped"]) for row in rows), collections.Counter())
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))


def describe(dropped: dict[str, int]) -> str:
    """Counts by reason as a phrase."""
    return ", ".join(f"{n} had {reason}" for reason, n in dropped.items() if n) or "none was dropped"


def summary(pairs: list[dict], rows: list[dict], counts: dict, kind: str) -> str:
    """What happened, in a few lines: acceptance by source, what was dropped, confidence and length of both sides."""
    lines = [f"{len(pairs)} pairs from {len(rows)} questions ({describe(counts['questions'])})"]
    for source, (right, of) in sorted(counts["accepted"].items()):
        lines.append(f"  {source}: {right} of {of} candidates correct ({right / of:.0%})")
    if counts["no_evidence"]:
        lines.append(f"  dropped: {counts['no_evidence']} correct ones that name nothing the passages say")
    if reasons := dropped_samples(rows):
        lines.append(f"  dropped while generating: {reasons}")
    quarters = lambda name: "/".join(f"{v:.2f}" for v in _quartiles([pair[name] for pair in pairs]))
    lines.append(
        f"  {kind} log-probability, quartiles: chosen {quarters('chosen_logprob')}, "
        f"rejected {quarters('rejected_logprob')}"
    )
    return "\n".join([*lines, lengths(pairs)])


def lengths(pairs: list[dict]) -> str:
    """How long both sides are, and a warning if it is what tells them apart."""
    chosen, rejected = (statistics.median(_words(pairs, side)) for side in ("chosen", "rejected"))
    warning = length_warning(pairs)
    return f"  words, median: chosen {chosen:.0f}, rejected {rejected:.0f}" + f"\n  Warning: {warning}" * bool(warning)


def length_warning(pairs: list[dict]) -> str | None:
    """A sentence if length alone tells chosen from rejected: one side longer in four pairs of five, by a half in the
    median. A preference loss would then teach length."""
    chosen, rejected = (_words(pairs, side) for side in ("chosen", "rejected"))
    for name, longer, shorter in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        share = sum(a > b for a, b in zip(longer, shorter, strict=True)) / len(pairs)
        ratio = statistics.median(a / max(b, 1) for a, b in zip(longer, shorter, strict=True))
        if share >= 0.8 and ratio >= 1.5:
            return (
                f"the {name} response is the longer one in {share:.0%} of the pairs, {ratio:.1f} times as long in the "
                "median; training may learn length rather than reading."
            )
    return None


def _words(pairs: list[dict], side: str) -> list[int]:
    return [len(words(pair[side])) for pair in pairs]


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
