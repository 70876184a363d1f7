"""The report's questions: each with its passages, its candidates, what was selected of them, and why or why not."""

from typing import Any

from roserag_jax.preference.selection import confidence, evidence, hinted_answers
from roserag_jax.rag.metrics import score_retrieval
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.report.funnel import ADVICE, explain, outcome_of
from roserag_jax.report.runs import Run


def sample(rows: list, most: int) -> list:
    """At most so many rows, evenly spaced."""
    return rows if len(rows) <= most else [rows[i * len(rows) // most] for i in range(most)]


def questions(run: Run, most: int) -> dict[str, Any]:
    """The training questions as the page's list reads them: `{rows, total, outcomes, advice, kind}`.

    Args:
      most: how many questions are taken, evenly spaced; `total` says of how many.
    """
    if run.candidates:
        every = [_question(run, row) for row in sample(run.candidates, most)]
        total = len(run.candidates)
    elif run.pairs:
        every = [_ready_made(pair) for pair in sample(run.pairs, most)]
        total = len(run.pairs)
    else:
        known = run.retrieved.get("train", [])
        every, total = [_retrieved(run, row) for row in sample(known, most)], len(known)
    outcomes = dict.fromkeys(row["outcome"] for row in every)
    return {
        "rows": every,
        "total": total,
        "outcomes": {name: explain(name) for name in outcomes},
        "advice": {name: ADVICE[name] for name in outcomes if name in ADVICE},
        "kind": "mean" if run.config.select.confidence == "mean" else "sum",
    }


def _question(run: Run, row: dict) -> dict[str, Any]:
    """A question with candidates."""
    pairs = run.pairs_of.get(row["id"], [])
    chosen, rejected = ({pair[side] for pair in pairs} for side in ("chosen", "rejected"))
    found = run.outcomes[row["id"]]
    shown, right = run.shown(row["id"]), [id(c) for c in found.right]
    read = evidence([c["rationale"] for c in found.candidates], hinted_answers(row, run.config.select), shown)
    candidates = [
        {
            "rationale": c["rationale"],
            "answer": c["answer"],
            "source": c["source"],
            "correct": c["correct"],
            "confidence": round(confidence(c, run.config.select.confidence), 3),
            "tokens": c["tokens"],
            "cites": sorted(words),
            # Correct, but selection may not choose it.
            "bare": bool(c["correct"]) and run.config.select.rejection and id(c) not in right,
            "chosen": c["response"] in chosen,
            "rejected": c["response"] in rejected,
        }
        for c, words in zip(found.candidates, read, strict=True)
    ]
    known = run.by_id.get(row["id"], {})
    return {
        "id": row["id"],
        "question": known.get("question", ""),
        "answers": row["golden_answers"],
        "type": str(known.get("metadata", {}).get("type", "")),
        "passages": _passages(run, row, shown),
        "candidates": candidates,
        "dropped": row.get("dropped", {}),
        "outcome": outcome_of(run, row["id"]),
    } | _held(row["golden_answers"], shown)


def _held(golden_answers: list[str], shown: list[dict]) -> dict[str, bool]:
    """Whether a passage shown holds a golden answer; nothing where that says nothing, as of yes and no."""
    found = score_retrieval({"golden_answers": golden_answers, "contexts": shown})["answer_recall"] if shown else None
    return {} if found is None else {"held": bool(found)}


def _passages(run: Run, row: dict, shown: list[dict]) -> list[dict[str, Any]]:
    """The passages as the prompt shows them, in its order, with what is known of each."""
    in_order = shown[:: PromptBuilder.STEPS[run.config.prompt.order]]
    texts = [row["prompt"][start:end] for start, end in row.get("passage_spans", [])]
    if len(texts) != len(in_order):  # the retrieved rows are others
        return [{"text": text} for text in texts]
    return [_passage(context, text) for context, text in zip(in_order, texts, strict=True)]


def _passage(context: dict, text: str | None = None) -> dict[str, Any]:
    whole = " ".join(f"{context['title']}: {context['text']}".split() if context["title"] else context["text"].split())
    text = whole if text is None else text
    title = " ".join(context["title"].split())
    body = text[len(title) + 2 :] if title and text.startswith(f"{title}: ") else text
    found = {"title": title if body != text else "", "text": body}
    if len(text) < len(whole):
        found["cut"] = len(whole) - len(text)
    if context.get("is_supporting") is not None:
        found["gold"] = bool(context["is_supporting"])
    return found


def _retrieved(run: Run, row: dict) -> dict[str, Any]:
    """A question of which only the passages are known."""
    shown = run.shown(row["id"])[:: PromptBuilder.STEPS[run.config.prompt.order]]
    return {
        "id": row["id"],
        "question": row["question"],
        "answers": row["golden_answers"],
        "type": str(row.get("metadata", {}).get("type", "")),
        "passages": [_passage(context) for context in shown],
        "candidates": [],
        "dropped": {},
        "outcome": "not generated",
    }


def _ready_made(pair: dict) -> dict[str, Any]:
    """A pair that was made elsewhere, as a question with two candidates."""
    spans = pair.get("passage_spans", [])
    side = lambda name: {
        "rationale": pair[name],
        "answer": "",
        "source": "ready-made",
        "correct": None,
        "confidence": pair.get(f"{name}_logprob"),
        "tokens": None,
        "cites": [],
        "bare": False,
        "chosen": name == "chosen",
        "rejected": name == "rejected",
    }
    return {
        "id": pair["id"],
        "question": "" if spans else pair.get("prompt", ""),
        "answers": [],
        "type": "",
        "passages": [{"text": pair["prompt"][start:end]} for start, end in spans],
        "candidates": [side("chosen"), side("rejected")],
        "dropped": {},
        "outcome": "pair",
    }
