"""Selection: one (chosen, rejected) pair per question, the hardest by default.

RoseRAG (arXiv 2502.10993), section 3: chosen is the correct rationale that the model is least sure of, rejected the
incorrect one that it is surest of. Confidence is the log-probability under the plain prompt.
"""

import itertools
import random
import statistics

from roserag_jax.errors import UserError
from roserag_jax.preference.candidates import dropped_samples
from roserag_jax.rag import answers

# Words of four letters and more that a rationale can have in common with any passage without having read it.
_STOCK = set(
    "about according also answer answered answers because been being both correct final first from given have here "
    "into last more most only other over passage passages question questions relevant said same says short should "
    "since some statement states such than that their them then there therefore these they this thus under very was "
    "were what when where which while with would".split()
)
_MATCHES = {"em": answers.exact_match, "contains": answers.contains}


def confidence(candidate: dict, kind: str) -> float:
    """Log-probability of a response, per token ('mean') or in all ('sum')."""
    return candidate["logprob"] / candidate["tokens"] if kind == "mean" else candidate["logprob"]


def evidence(rationale: str, golden_answers: list[str], passages: list[dict]) -> int:
    """How many different words of the passages a rationale holds, beyond the golden answers' words and stock words.

    The guided prompt's hint is "The answer is ...". A rationale that only restates it leads to the right answer,
    because it contains it, and has the lowest log-probability of all, because nothing supports it: hard selection would
    choose it before any real reading. Such a rationale has no word in common with the passages that it did not get from
    the hint, in whatever phrase it is put; one that reads them names at least what it reads about. Words are compared
    after normalisation; those of three letters and less count only as numbers.
    """
    words = lambda text: {w for w in answers.normalize(text).split() if len(w) > 3 or w.isdigit()}
    known = set().union(*(words(answer) for answer in golden_answers)) | _STOCK
    seen = set().union(*(words(f"{p['title']} {p['text']}") for p in passages))
    return len((words(rationale) & seen) - known)


def supported(golden_answers: list[str], passages: list[dict]) -> bool:
    """Whether a passage holds a golden answer as whole words, or the question is one of yes or no.

    Where none does, a rationale that leads to the answer took it from the hint or made it up.
    """
    return answers.closed(golden_answers[0]) or any(answers.holds(p, golden_answers) for p in passages)


def judged(row: dict, match: str) -> list[dict]:
    """A row's candidates, `correct` by the given match ('em' or 'contains') of their answers."""
    verdict = _MATCHES[match]
    return [{**c, "correct": bool(verdict(c["answer"], row["golden_answers"]))} for c in row["candidates"]]


def select(rows: list[dict], passages: dict[str, list[dict]], options, seed: int) -> tuple[list[dict], dict]:
    """Pairs from candidates, and what became of questions and candidates.

    Args:
      rows: as `generate` writes them.
      passages: what was shown for each question, by its id.
      options: `config.select`. Without `rejection` (the paper's ablation) a chosen response is any guided candidate and
        a rejected one any plain candidate, unchecked.

    Returns:
      Pairs `{id, prompt, passage_spans, chosen, rejected, chosen_logprob, rejected_logprob, margin}`; log-probabilities
      are of the given kind and margin is chosen minus rejected. And counts: `{questions: {reason: dropped},
      no_evidence, accepted: {source: [correct, of so many]}}`.

    Raises:
      UserError: no question has both kinds of candidates.
    """
    reasons = ("no candidate", "all correct", "none correct", "no evidence", "no support", "one source only")
    pairs, dropped = [], dict.fromkeys(reasons, 0)
    counts = {"questions": dropped, "no_evidence": 0, "accepted": {}}
    for row in rows:
        candidates = judged(row, options.match)
        for c in candidates:
            tally = counts["accepted"].setdefault(c["source"], [0, 0])
            tally[0] += c["correct"]
            tally[1] += 1
        if options.rejection:
            correct = [c for c in candidates if c["correct"]]
            wrong = [c for c in candidates if not c["correct"]]
            shown = passages[row["id"]]
            bare = lambda c: evidence(c["rationale"], row["golden_answers"], shown) < options.evidence  # noqa: B023
            right = [c for c in correct if not bare(c)] if options.evidence and shown else correct
            counts["no_evidence"] += len(correct) - len(right)
            unsupported = bool(options.supported and right and not supported(row["golden_answers"], shown))
            right = [] if unsupported else right
        else:
            right, wrong = ([c for c in candidates if c["source"] == s] for s in ("guided", "plain"))
            correct, unsupported = right, False
        if not right or not wrong:
            if not candidates:
                reason = "no candidate"
            elif not options.rejection:
                reason = "one source only"
            elif not wrong:
                reason = "all correct"
            elif unsupported:
                reason = "no support"
            else:
                reason = "no evidence" if correct else "none correct"
            dropped[reason] += 1
            continue
        sure = lambda c: (confidence(c, options.confidence), c["response"])
        if options.strategy == "hard":
            picked = [(min(right, key=sure), max(wrong, key=sure))]
        elif options.strategy == "easy":
            picked = [(max(right, key=sure), min(wrong, key=sure))]
        elif options.strategy == "random":
            rng = random.Random(f"{seed}/{row['id']}")
            picked = [(rng.choice(right), rng.choice(wrong))]
        else:
            picked = list(itertools.product(right, wrong))
        for chosen, rejected in picked:
            ours, theirs = confidence(chosen, options.confidence), confidence(rejected, options.confidence)
            pairs.append(
                {
                    "id": row["id"],
                    "prompt": row["prompt"],
                    "passage_spans": row.get("passage_spans", []),
                    "chosen": chosen["response"],
                    "rejected": rejected["response"],
                    "chosen_logprob": round(ours, 4),
                    "rejected_logprob": round(theirs, 4),
                    "margin": round(ours - theirs, 4),
                }
            )
    if not pairs:
        raise UserError(
            f"No pair survived selection: of {len(rows)} questions {describe(dropped)}. A pair needs a correct and an "
            "incorrect candidate: raise config.generate.guided_samples, plain_samples or temperature, or use "
            "more questions."
        )
    return pairs, counts


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
    return [len(pair[side].split()) for pair in pairs]


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
