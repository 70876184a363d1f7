"""Answer the held-out questions with the base model and with the adapter, and score the answers.

    python -m roserag_jax.evaluate --config configs/quickstart.py [--config.evaluate.systems="('base',)"]

Reads `retrieved_eval.jsonl` and the adapter, writes `eval/base/` and `eval/adapter/`, each with `metrics.json`,
`predictions.json` (HotPotQA's format) and `examples.jsonl` (what was said, row by row).
"""

import json
import sys
from pathlib import Path

from etils import epath

from roserag_jax import config as options
from roserag_jax import retrieve
from roserag_jax.generate import batches, filled
from roserag_jax.rag import answers, metrics
from roserag_jax.rag.prompts import PromptBuilder
from roserag_jax.report.tables import table
from roserag_jax.runtime.progress import Progress
from roserag_jax.runtime.sampler import Sampling
from roserag_jax.runtime.session import Session
from roserag_jax.workdir import Parts, Recipe, Workdir, digest, to_lines


def adapter_folder(config, workdir: Workdir) -> epath.Path:
    """The adapter that the configuration names, or the workdir's own."""
    return epath.Path(config.adapter).expanduser() if config.adapter else workdir / "adapter"


def adapter_in_use(config, workdir: Workdir) -> Path | None:
    """The adapter to answer with: the one that is named, else the workdir's if it has one; the choice is shown."""
    folder = adapter_folder(config, workdir)
    found = config.adapter or workdir.manifest("adapter") is not None
    print(f"Model: {config.model}, {f'adapter: {folder}' if found else 'no adapter'}", file=sys.stderr)
    return Path(folder) if found else None


def recipe(config, workdir: Workdir, system: str) -> Recipe:
    """What an evaluation is made from."""
    names = [*Session.model_options, "prompt", "evaluate.max_tokens"]
    inputs = {"retrieved_eval.jsonl": workdir.check(retrieve.ARTIFACTS["eval"])}
    if system == "adapter":
        inputs["adapter"] = digest(adapter_folder(config, workdir))
    return Recipe(options.subset(config, *names), inputs)


def respond(engine, tokenizer, rows, prompts, shared, size: int, max_tokens: int):
    """Greedy responses to one batch of prompts with a shared beginning, as `(text, finished)` for each row."""
    padded = filled(prompts, size)
    cache = engine.prefill([p.tokens for p in padded], shared)
    ids = [row["id"] for row in rows] + [""] * (size - len(rows))
    out = engine.decode(cache, [[p.tokens[-1:]] for p in padded], 1, ids, 0, Sampling(), max_tokens)
    texts = [tokenizer.decode(out.tokens[i, 0, : out.lengths[i, 0]]) for i in range(len(rows))]
    return list(zip(texts, out.finished[: len(rows), 0].tolist(), strict=True))


def make(session: Session, workdir: Workdir, system: str) -> dict:
    """Bring the evaluation of 'base' or 'adapter' up to date and return its metrics."""
    config, name = session.config, f"eval/{system}"
    retrieve.make(config, workdir, ("eval",))
    folder = adapter_folder(config, workdir)
    if system == "adapter" and not config.adapter:
        workdir.check("adapter")
    wanted = recipe(config, workdir, system)
    if workdir.fresh(name, wanted):
        return json.loads((workdir / name / "metrics.json").read_text())
    rows, size = workdir.rows(retrieve.ARTIFACTS["eval"]), config.evaluate.batch
    builder = PromptBuilder(session.tokenizer, **config.prompt)
    prompts = [builder.plain(row) for row in rows]
    groups = batches(prompts, size)
    parts = Parts(workdir, f"evaluate-{system}", wanted.fingerprint(batch=size, mesh=config.mesh.to_dict()))
    count = lambda: sum(len(part) for part in parts.done.values())
    progress = Progress(f"evaluate {system}", len(rows), "questions", count())
    if len(parts.done) < len(groups):
        engine = session.engine(Path(folder) if system == "adapter" else None)
        shared = engine.read_shared([p.tokens for p in prompts])
    for number, group in enumerate(groups):
        if number in parts.done:
            continue
        progress.phase(f"answering {len(group)} questions")
        asked = [rows[i] for i in group]
        of_group = [prompts[i] for i in group]
        said = respond(engine, session.tokenizer, asked, of_group, shared, size, config.evaluate.max_tokens)
        examples = []
        for i, row, (response, finished) in zip(group, asked, said, strict=True):
            rationale, prediction, parsed = answers.parse(response)
            shown = {**row, "contexts": row.get("contexts", [])[: config.prompt.passages]}
            examples.append(
                {
                    "id": row["id"],
                    "question": row["question"],
                    "golden_answers": row["golden_answers"],
                    "prediction": prediction,
                    "rationale": rationale,
                    "response": response,
                    "finished": finished,
                    "scores": metrics.score_row(shown, prediction, parsed),
                    "prompt": prompts[i].text,
                }
            )
        parts.write(number, examples)
        scores = [e["scores"] for part in parts.done.values() for e in part]
        progress.update(count(), f"EM {100 * sum(s['em'] for s in scores) / len(scores):.1f}")
    by_id = {example["id"]: example for part in parts.done.values() for example in part}
    examples = [by_id[row["id"]] for row in rows]
    result = metrics.summarize([example["scores"] for example in examples])
    predictions = {"answer": {example["id"]: example["prediction"] for example in examples}, "sp": {}}
    files = {
        "metrics.json": json.dumps(result, indent=2) + "\n",
        "predictions.json": json.dumps(predictions, ensure_ascii=False, indent=1) + "\n",
        "examples.jsonl": to_lines(examples),
    }
    workdir.publish(name, wanted, files, len(examples))
    parts.clear()
    return result


def comparison(results: dict[str, dict]) -> str:
    """A table of systems: EM and F1 with their intervals."""
    body = []
    for system, result in results.items():
        cells = [
            f"{result[m]:.1f}  [{result[f'{m}_interval'][0]:.1f}, {result[f'{m}_interval'][1]:.1f}]"
            for m in ("em", "f1")
        ]
        body.append([system, *cells, f"{result['parsed']:.0f}%", str(result["questions"])])
    return table(["system", "EM  [95%]", "F1  [95%]", "answer line", "questions"], body)


def run(config) -> None:
    """The command."""
    workdir, session = Workdir(config.workdir), Session(config)
    with workdir.lock():
        results = {system: make(session, workdir, system) for system in config.evaluate.systems}
        print(f"\n{comparison(results)}\n")
        print("Made " + ", ".join(str(workdir / "eval" / system) for system in results) + ".")


if __name__ == "__main__":
    options.main(run, __doc__)
