"""Scores of a whole evaluation: means with bootstrap intervals, by question type and gold passages, and compared."""

import collections
from collections.abc import Sequence

import numpy as np

from roserag_jax.errors import UserError
from roserag_jax.rag import answers
from roserag_jax.rag.words import words

# What an evaluation is measured by, and how tables call it: exact match and F1 always, similarity where it is wanted.
SIMILARITY = {"rouge_l": "ROUGE-L", "bert_score": "BERTScore"}
MEASURES = {"em": "EM", "f1": "F1", **SIMILARITY}
_AT_ONCE = 10**6  # values drawn at a time, which bounds the memory


def score_row(row: dict, prediction: str, parsed: bool, measure: answers.Measure = answers.HOTPOTQA) -> dict:
    """Scores of one prediction, and what the summary groups by.

    Args:
      row: a unified row with the contexts that were shown, and how many gold passages there are, `gold_count`.
      measure: how exact match and F1 are computed.
    """
    golden = row["golden_answers"]
    flags = [c.get("is_supporting") for c in row.get("contexts", [])]
    return {
        "em": measure.exact_match(prediction, golden),
        "f1": measure.f1(prediction, golden),
        "contains": answers.contains(prediction, golden),
        "parsed": float(parsed),
        "accuracy": answers.yes_no_accuracy(prediction, golden),
        "type": str(row.get("metadata", {}).get("type", "all")),
        "gold_passages": "unknown" if None in flags else str(sum(flags)),
        "retrieval": score_retrieval(row) if row.get("contexts") else None,
    }


class RougeL:
    """ROUGE-L of Google's rouge-score, over the words of any language: its own tokenizer knows ASCII alone.

    Raises:
      UserError: rouge-score is not installed.
    """

    def __init__(self):
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise UserError(
                "config.evaluate.similarity has rouge_l, which needs rouge-score: pip install -e '.[summaries]'."
            ) from error
        self._scorer = RougeScorer(["rougeL"], tokenizer=self)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text; what rouge-score asks of a tokenizer."""
        return words(text)

    def __call__(self, prediction: str, golden: Sequence[str]) -> float:
        """F-measure of the longest common subsequence of words, the best over the golden answers."""
        return float(self._scorer.score_multi(golden, prediction)["rougeL"].fmeasure)


def measures_of(scores: dict) -> dict[str, str]:
    """The measures that scores or metrics hold, by name, with their titles."""
    return {name: title for name, title in MEASURES.items() if name in scores}


def gold_count(row: dict) -> int | None:
    """How many gold passages a question has, shown or not; None if its contexts do not say which are gold."""
    flags = [c.get("is_supporting") for c in row.get("contexts", [])]
    return None if None in flags else row.get("gold_count", sum(flags))


def score_retrieval(row: dict) -> dict:
    """Scores of the passages shown for one question, in their order.

    Returns:
      `recall`, the fraction of its gold passages that are shown, and `reciprocal_rank`, one over the place of the first
      of them, both None where gold passages are not known or there are none; `answer_recall`, 1.0 if a passage contains
      a golden answer, None for a yes/no question and one without golden answers.
    """
    golden, total = row["golden_answers"], row.get("gold_count")
    places = [place for place, c in enumerate(row["contexts"], 1) if c.get("is_supporting")]
    answered = any(answers.is_answered_by(c, golden) for c in row["contexts"])
    return {
        "recall": len(places) / max(total, len(places)) if total else None,
        "reciprocal_rank": (1 / places[0] if places else 0.0) if total else None,
        "answer_recall": float(answered) if golden and not answers.is_yes_no(golden[0]) else None,
    }


def interval(values: Sequence[float] | np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean."""
    values = np.asarray(values)
    rng, means = np.random.default_rng(seed), []
    rows = max(1, _AT_ONCE // len(values))  # of the generator's one stream
    for first in range(0, draws, rows):
        picks = rng.integers(0, len(values), (min(rows, draws - first), len(values)))
        means.append(values[picks].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def summarize(scores: list[dict]) -> dict:
    """Means in percent, those of `MEASURES` with intervals and by group, and accuracy on yes/no questions if any."""
    measures = measures_of(scores[0])
    percent = lambda name, rows=scores: round(100 * float(np.mean([row[name] for row in rows])), 2)
    result = {"questions": len(scores)} | {name: percent(name) for name in (*measures, "contains", "parsed")}
    result["unparsed"] = sum(not row["parsed"] for row in scores)
    for name in measures:
        low, high = interval([row[name] for row in scores])
        result[f"{name}_interval"] = [round(100 * low, 2), round(100 * high, 2)]
    if closed := [row for row in scores if row["accuracy"] is not None]:
        low, high = interval([row["accuracy"] for row in closed])
        result["yes_no"] = {
            "questions": len(closed),
            "accuracy": percent("accuracy", closed),
            "accuracy_interval": [round(100 * low, 2), round(100 * high, 2)],
        }
    if shown := [row["retrieval"] for row in scores if row["retrieval"]]:
        known = {name: [score[name] for score in shown if score[name] is not None] for name in shown[0]}
        result["retrieval"] = {name: round(100 * float(np.mean(values)), 2) for name, values in known.items() if values}
    for key in ("type", "gold_passages"):
        groups = collections.defaultdict(list)
        for row in scores:
            groups[row[key]].append(row)
        result[f"by_{key}"] = {
            group: {"questions": len(rows)} | {name: percent(name, rows) for name in measures}
            for group, rows in sorted(groups.items())
        }
    return result


def distraction_ratio(closed_book: float, rag: float) -> float | None:
    """max(0, (EM_closed_book - EM_rag) / EM_closed_book); None where the closed book knows nothing."""
    return max(0.0, (closed_book - rag) / closed_book) if closed_book else None


def paired(
    scores: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray, draws: int = 10_000, seed: int = 0
) -> dict:
    """Two runs on the same questions, compared question by question.

    Returns:
      `difference` of the means, its 95% bootstrap `interval` over questions, how many questions got better and worse,
      and the two-sided `p` of a permutation test that swaps the runs' scores within a question (exact up to 13
      questions; with scores of 0 and 1 it is McNemar's).
    """
    from scipy import stats

    difference = np.asarray(scores) - np.asarray(others)
    changed = difference[difference != 0]  # a swap changes nothing on the others
    p = 1.0  # also of a single change, which a swap makes no smaller
    if len(changed) > 1:
        p = stats.permutation_test(
            (changed,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=draws,
            batch=max(1, _AT_ONCE // len(changed)),
            rng=seed,
        ).pvalue
    return {
        "difference": float(difference.mean()),
        "interval": interval(difference, seed=seed),
        "better": int((difference > 0).sum()),
        "worse": int((difference < 0).sum()),
        "p": float(p),
    }
