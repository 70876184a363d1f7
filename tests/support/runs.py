"""Workdirs as `train` leaves them, made without a model."""

import json

from roserag_jax import options
from roserag_jax.preference import selection
from roserag_jax.rag import metrics
from roserag_jax.workdir import RETRIEVED, Recipe, Workdir, to_jsonl


def write_run(folder, questions=6, text="", systems=("base", "adapter"), steps=4):
    """A workdir as `train` leaves it, made by the real selection and scores but without a model.

    Of three questions one has a pair, one no correct candidate and one no incorrect one. `text` stands in every
    question, passage, candidate and answer.
    """
    work, config = Workdir(str(folder)), options.defaults()
    recipe = lambda *names: Recipe(options.subset(config, *names), {})
    passage = lambda title, words, gold: {"title": title, "text": f"{words} {text}", "is_supporting": gold}
    rows = [
        {
            "id": f"q{i}",
            "question": f"Who founded museum {i}? {text}",
            "golden_answers": ["Ada Lund"],
            "contexts": [passage("Museum", "Ada Lund founded it.", True), passage("Mill", "It burns.", False)],
            "metadata": {"type": ("one_hop", "two_hop")[i % 2]},
        }
        for i in range(questions)
    ]
    config.prompt.passages, config.workdir = 2, str(folder)
    config.data.train = config.data.eval = "questions.jsonl"
    for split, name in RETRIEVED.items():
        work.publish(name, recipe(f"data.{split}", "retrieve"), to_jsonl(rows), len(rows))
    made = []
    for i, row in enumerate(rows):
        prompt, spans = "", []
        for number, c in enumerate(row["contexts"], 1):
            prompt += f"Passage {number}: "
            shown = " ".join(f"{c['title']}: {c['text']}".split())
            spans.append((len(prompt), len(prompt) + len(shown)))
            prompt += f"{shown}\n"
        candidates = []
        for correct in ((True, False), (False, False), (True, True))[i % 3]:
            answer = "Ada Lund" if correct else f"the mill {text}"
            rationale = f"Passage {1 if correct else 2} names the museum {len(candidates)}. {text}"
            candidates.append(
                {
                    "response": f"{rationale}\nAnswer: {answer}",
                    "rationale": rationale,
                    "answer": answer,
                    "source": ("guided", "plain")[len(candidates) % 2],
                    "correct": correct,
                    "logprob": -8.0 - i - len(candidates),
                    "tokens": 16,
                }
            )
        golden = {"golden_answers": row["golden_answers"], "dropped": {"repeated": 1}}
        made.append({"id": row["id"], "prompt": prompt, "passage_spans": spans, "candidates": candidates, **golden})
    work.publish("candidates.jsonl", recipe("model", "prompt", "generate"), to_jsonl(made), len(made))
    pairs, _ = selection.select(made, {row["id"]: row["contexts"] for row in rows}, config.select, 0)
    work.publish("pairs.jsonl", recipe("select"), to_jsonl(pairs), len(pairs))
    log = []
    for step in range(steps):
        loss = {"loss": 1.0 - step / 10, "nll": 0.5, "margin": step / 10 - 0.1, "accuracy": 0.5, "learning_rate": 1e-4}
        log.append(
            {"step": step + 1, **loss, "gradient_norm": 1.0, "tokens_per_s": 50.0, "pairs_per_s": 1.0, "mfu": 0.3}
        )
    log.append({"step": steps, "held_out_loss": 0.8, "held_out_accuracy": 0.5, "measure": "loss"})
    (folder / "metrics.jsonl").write_text(to_jsonl(log))
    work.publish("adapter", recipe("lora", "train"), {"adapter_config.json": "{}"}, len(pairs))
    for number, system in enumerate(systems):
        examples = []
        for i, row in enumerate(rows):
            answer = "Ada Lund" if i % 3 < number + 1 else f"nobody {text}"
            said = {"prediction": answer, "response": f"It says so. {text}\nAnswer: {answer}"}
            common = {"id": row["id"], "question": row["question"], "golden_answers": row["golden_answers"]}
            examples.append({**common, **said, "scores": metrics.score_row(row, answer, True)})
        result = {
            "system": system,
            "passages": 2,
            "noise": "none",
            **metrics.summarize([e["scores"] for e in examples]),
        }
        result |= {"prompt_tokens": 90.0, "response_tokens": 20.0, "prompts_cut": 0, "seconds_per_question": 0.5}
        files = {"metrics.json": json.dumps(result), "examples.jsonl": to_jsonl(examples)}
        work.publish(f"eval/{system}", recipe("prompt"), files, len(rows))
    return folder
