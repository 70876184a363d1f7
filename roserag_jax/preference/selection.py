"""Selection: one (chosen, rejected) pair per question, the hardest by default.

RoseRAG (arXiv 2502.10993), section 3: chosen is the correct rationale that the model is least sure of, rejected the
incorrect one that it is surest of. Confidence is the log-probability under the plain prompt.
"""

import itertools
import random

from roserag_jax.errors import UserError


def confidence(candidate: dict, kind: str) -> float:
    """Log-probability of a response, per token ('mean') or in all ('sum')."""
    return candidate["logprob"] / candidate["tokens"] if kind == "mean" else candidate["logprob"]


def select(rows: list[dict], strategy: str, kind: str, seed: int) -> tuple[list[dict], dict[str, int]]:
    """Pairs from candidates, and how many questions gave none, by reason.

    Args:
      rows: as `generate` writes them.
      strategy: 'hard', 'easy' (the reverse), 'random' or 'all' (every combination).
      kind: 'mean' or 'sum' confidence.

    Returns:
      Pairs `{id, prompt, chosen, rejected, chosen_logprob, rejected_logprob, margin}`; log-probabilities are of the
      given kind and margin is chosen minus rejected.

    Raises:
      UserError: no question has both kinds of candidates.
    """
    pairs, dropped = [], {"no candidate": 0, "all correct": 0, "none correct": 0}
    for row in rows:
        right = [c for c in row["candidates"] if c["correct"]]
        wrong = [c for c in row["candidates"] if not c["correct"]]
        if not right or not wrong:
            dropped["all correct" if right else "none correct" if wrong else "no candidate"] += 1
            continue
        sure = lambda c: (confidence(c, kind), c["response"])
        if strategy == "hard":
            picked = [(min(right, key=sure), max(wrong, key=sure))]
        elif strategy == "easy":
            picked = [(max(right, key=sure), min(wrong, key=sure))]
        elif strategy == "random":
            rng = random.Random(f"{seed}/{row['id']}")
            picked = [(rng.choice(right), rng.choice(wrong))]
        else:
            picked = list(itertools.product(right, wrong))
        for chosen, rejected in picked:
            ours, theirs = confidence(chosen, kind), confidence(rejected, kind)
            pairs.append(
                {
                    "id": row["id"],
                    "prompt": row["prompt"],
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
    return pairs, dropped


def describe(dropped: dict[str, int]) -> str:
    """Counts by reason as a phrase."""
    return ", ".join(f"{n} had {reason}" for reason, n in dropped.items() if n) or "none was dropped"
