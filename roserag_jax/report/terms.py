"""What the report's words mean, one sentence each, for whoever reads a report for the first time."""

from roserag_jax.rag.noise import CONDITIONS, parse

Terms = list[tuple[str, str]]

FUNNEL: Terms = [
    ("golden answer", "an answer that the question's file gives as right"),
    ("gold passage", "a passage that the question's file marks as holding what its answer needs"),
    ("plain prompt", "passages and question, as the model will see them in use"),
    ("guided prompt", "the same with the golden answer added as a hint, to get more right rationales"),
    ("rationale", "the reasoning that the model writes before its answer line"),
    (
        "candidate",
        "a sampled rationale, put behind the plain prompt (no hint), and the answer that the model gives after it",
    ),
    ("correct", "the candidate's answer equals a golden answer"),
    (
        "confidence",
        "the log-probability of the candidate under the plain prompt (per token, unless config.select.confidence says "
        "otherwise): 0 is certain, the more negative the less sure; -0.7 per token is a probability of one half",
    ),
    (
        "chosen, rejected",
        "the two candidates of a pair: training makes the first likelier than the second. By default it is the hard "
        "pair: the correct candidate that the model is least sure of, and the incorrect one that it is surest of",
    ),
    ("cites", "has a word in common with the passages that is neither common nor of the golden answer"),
]

_SYSTEMS = {
    "base": "the model without an adapter",
    "adapter": "the same model with the adapter that was trained",
    "closed_book": "the base model with the question alone, without passages",
}
_SCORES = {
    "EM": "exact match: percent of questions whose answer is a golden answer, but for case, punctuation and articles",
    "F1": "how far the words of answer and golden answer overlap, 0 to 100; the best of several golden answers counts",
    "[95%]": "an interval by bootstrap: scores of 95 in 100 redrawn sets of as many questions lie in it",
    "contains": "percent of questions whose answer holds a golden answer, whatever else it says",
    "yes/no": "percent of the yes/no questions that are answered right",
    "recall@K": "percent of a question's gold passages that are among the K shown",
    "MRR": "mean reciprocal rank: 100 if the first passage shown is always gold, 50 if the second is",
    "answer recall": "percent of questions of which a passage shown holds a golden answer",
    "distraction": "the fraction of the closed-book EM that is lost where passages are shown; 0 is none",
    "answer line": "percent of responses that end with 'Answer: ...', as the prompt asks",
    "tokens in+out": "mean tokens of a prompt, and of a response",
    "s/question": "the time of the whole evaluation over the number of its questions",
}
TESTS: Terms = [
    ("difference", "of the two systems' scores on the same questions, in points, with its 95% interval"),
    ("better, worse", "questions that the first system answers better, and worse, than the second"),
    ("p", "how often chance alone would give so large a difference; below 0.05 two systems are called different"),
]


def of_scores(results: dict[str, dict], header: list[str]) -> Terms:
    """The words of a table of systems: those of its columns, and what its systems' names mean."""
    columns = [(word, meaning) for word, meaning in _SCORES.items() if any(word in cell for cell in header)]
    return [*of_systems(results), *columns]


def of_systems(results: dict[str, dict]) -> Terms:
    """What the names of evaluations mean."""
    systems = dict.fromkeys(result["system"] for result in results.values())
    found = [(name, _SYSTEMS[name]) for name in systems if name in _SYSTEMS]
    if any("-k" in name.removeprefix(result["system"]) for name, result in results.items()):
        found.append(("-k2", "with two passages shown, -k5 with five; without it, as many as the configuration says"))
    for name in dict.fromkeys(result["noise"] for result in results.values()):
        try:
            kind, number = parse(name)
        except ValueError:
            continue
        if kind != "none":
            note = f" ({CONDITIONS[kind].parameter} = {number})" if number else ""
            found.append((f"-{name}", f"passages shown: {CONDITIONS[kind].help}{note}"))
    return found
