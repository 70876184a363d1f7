"""Answer the held-out questions with several systems, score the answers and compare them.

    python -m roserag_jax.evaluate --config configs/quickstart.py [--config.evaluate.systems="('closed_book', 'base')"]
        [--config.evaluate.passages="(1, 5)"] [--config.evaluate.noise="('none', 'random3')"]

Reads `retrieved_eval.jsonl` and the adapters, writes `eval/base/`, `eval/adapter/`, or `eval/adapter-k5-random3/` for
five passages and three random ones, each with `metrics.json`, `predictions.json` (the official scripts' format) and
`examples.jsonl` (prompt, completion and scores of each question).
"""

import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable

from etils import epath

from roserag_jax import cli, options, retrieve
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.inference.respond import respond
from roserag_jax.progress import Progress
from roserag_jax.rag import answers, corpora, metrics
from roserag_jax.rag.noise import Noise
from roserag_jax.rag.prompts import PromptBuilder, opens_thoughts
from roserag_jax.report.comparison import summary
from roserag_jax.retrieval.bm25 import BM25
from roserag_jax.session import Session
from roserag_jax.workdir import PartialResults, Recipe, Workdir, digest, resolve_path, to_jsonl


def adapter_folder(config, workdir: Workdir) -> epath.Path:
    """The adapter that the configuration names, or the workdir's own."""
    return epath.Path(config.adapter).expanduser() if config.adapter else workdir / "adapter"


def adapter_in_use(config, workdir: Workdir) -> epath.Path | None:
    """The adapter to answer with: the one that is named, else the workdir's if it has one; the choice is shown."""
    folder = adapter_folder(config, workdir)
    found = config.adapter or workdir.manifest("adapter") is not None
    print(f"Model: {config.model}, {f'adapter: {folder}' if found else 'no adapter'}", file=sys.stderr)
    return folder if found else None


def systems(config, workdir: Workdir) -> dict[str, epath.Path | None]:
    """The systems to compare by name, each with its adapter; those of `evaluate.adapters` go by their folder's name.

    Raises:
      UserError: two adapters have one name, or one is not there.
    """
    found = {name: adapter_folder(config, workdir) if name == "adapter" else None for name in config.evaluate.systems}
    for folder in map(resolve_path, config.evaluate.adapters):
        name = folder.parent.name if folder.name == "adapter" else folder.name
        name = re.sub(r"[^\w-]+", "_", name)
        if name in (*found, "closed_book", "base", "adapter"):
            raise UserError(f"config.evaluate.adapters: {folder} would be called {name!r}, which is taken; rename it.")
        found[name] = folder
    for name, folder in found.items():
        own = name == "adapter" and not config.adapter  # the workdir's, which may be yet to come
        if folder is not None and not own and not folder.exists():
            raise UserError(f"There is no adapter {folder}.")
    return found


def artifact(system: str, passages: int | None, noise: str) -> str:
    """The artifact of one evaluation: eval/base, eval/base-k5, eval/adapter-k5-random3."""
    if system == "closed_book":
        return "eval/closed_book"
    return f"eval/{system}" + (f"-k{passages}" if passages else "") + (f"-{noise}" if noise != "none" else "")


def recipe(config, workdir: Workdir, folder: epath.Path | None, passages: int, noise: str) -> Recipe:
    """What an evaluation is made from."""
    names = [*Session.model_options, "prompt", "evaluate.max_tokens"]
    inputs = {"retrieved_eval.jsonl": workdir.verify(retrieve.ARTIFACTS["eval"])}
    if folder is not None:
        inputs["adapter"] = digest(folder)
    changed = {"prompt.passages": passages, "evaluate.noise": noise}
    if noise != "none":
        names += ["seed", "retrieve.corpus"]
        inputs |= retrieve.file_digest(config, "retrieve.corpus")
    return Recipe(options.subset(config, *names) | changed, inputs)


@functools.lru_cache(maxsize=1)
def _corpus(path: str) -> tuple[list[dict], Callable[[], BM25]]:
    """A corpus for all evaluations of a call, and what gives its index."""
    pool = corpora.read_corpus(path)
    return pool, functools.cache(lambda: BM25(pool))


def shown_rows(config, rows: list[dict], passages: int, noise: str) -> list[dict]:
    """Rows with the contexts that are shown: the first K, and what the noise makes of them.

    Noise comes from the corpus that is named, else from the contexts of all rows.
    """
    if noise == "none":
        return [{**row, "contexts": row.get("contexts", [])[:passages]} for row in rows]
    if config.retrieve.corpus:
        pool, index = _corpus(config.retrieve.corpus)
    else:
        contexts = [c for row in rows for c in row.get("contexts", [])]
        pool, index = list({(c["title"], c["text"]): c for c in contexts}.values()), None
    made = Noise(noise, config.seed, rows, pool, index)
    return [{**row, "contexts": made.passages(row, passages)} for row in rows]


def make(session: Session, workdir: Workdir, system: str, passages: int | None = None, noise: str = "none") -> dict:
    """Bring one evaluation up to date and return its metrics.

    Args:
      system: 'closed_book', 'base', 'adapter' or the name of one of `evaluate.adapters`.
      passages: K; None is `prompt.passages`.
      noise: a condition of `rag.noise`.
    """
    config, name = session.config, artifact(system, passages, noise)
    with processes.main_first():
        retrieve.make(config, workdir, ("eval",))
    folder = systems(config, workdir).get(system)
    if system == "adapter":
        folder = adapter_folder(config, workdir)
        if not config.adapter:
            workdir.verify("adapter")
    K = 0 if system == "closed_book" else passages or config.prompt.passages
    wanted = recipe(config, workdir, folder, K, noise)
    if workdir.is_up_to_date(name, wanted):
        return json.loads((workdir / name / "metrics.json").read_text())
    rows = workdir.rows(retrieve.ARTIFACTS["eval"])
    if passages and passages > (most := max(len(row.get("contexts", [])) for row in rows)):
        raise UserError(f"config.evaluate.passages: no question has {passages} passages, at most {most}.")
    rows = shown_rows(config, rows, K, noise)
    shape = {**config.prompt, "passages": K and max(len(row["contexts"]) for row in rows) or K}
    builder = PromptBuilder(session.tokenizer, **shape)
    prompts = [builder.plain(row) for row in rows]
    label = name.removeprefix("eval/")
    parts = PartialResults(workdir, f"evaluate-{label}", wanted.fingerprint(), [row["id"] for row in rows])
    missing, em = parts.missing(), sum(example["scores"]["em"] for example in parts.done.values())
    progress = Progress(f"evaluate {label}", len(parts.done) + len(missing), "questions", len(parts.done))
    if missing:
        engine = session.own.engine(folder)
        progress.phase(f"answering {len(missing)} questions")
        responses = respond(
            engine,
            session.tokenizer,
            [prompt.tokens for prompt in prompts],
            slots=config.evaluate.batch,
            max_new_tokens=config.evaluate.max_tokens,
            stop_strings=builder.stop,
            only=missing,
        )
        clock = time.monotonic()
        for response in responses:
            row, prompt = rows[response.number], prompts[response.number]
            rationale, prediction, parsed = answers.parse(response.text, opens_thoughts(prompt.text))
            example = {
                "id": row["id"],
                "question": row["question"],
                "golden_answers": row["golden_answers"],
                "prediction": prediction,
                "rationale": rationale,
                "response": response.text,
                "finished": response.finished,
                "scores": metrics.score_row(row, prediction, parsed),
                "prompt_tokens": len(prompt.tokens),
                "response_tokens": response.tokens,
                "prompt_cut": prompt.cut,
                "prompt": prompt.text,
                "seconds": time.monotonic() - clock,
            }
            clock = time.monotonic()
            parts.add(example)
            em += example["scores"]["em"]
            progress.update(len(parts.done), f"EM {100 * em / len(parts.done):.1f}")
    examples = parts.gather()
    with processes.main_first():
        if processes.is_main():
            _publish(workdir, name, wanted, examples, {"system": system, "passages": K, "noise": noise})
            parts.clear()
    return json.loads((workdir / name / "metrics.json").read_text())


def _publish(workdir: Workdir, name: str, wanted: Recipe, examples: list[dict], about: dict) -> None:
    """Write an evaluation from its examples."""
    # Each is counted from when the one before was finished. Time is no function of the input: it stays out of the rows.
    seconds = statistics.fmean(example.pop("seconds") for example in examples)
    mean = lambda field: round(statistics.fmean(example[field] for example in examples), 1)
    result = about | metrics.summarize([example["scores"] for example in examples])
    result |= {field: mean(field) for field in ("prompt_tokens", "response_tokens")}
    result |= {"prompts_cut": sum(e["prompt_cut"] > 0 for e in examples), "seconds_per_question": round(seconds, 4)}
    files = {
        "metrics.json": json.dumps(result, indent=2) + "\n",
        "examples.jsonl": to_jsonl(examples),
        **_official(examples),
    }
    workdir.publish(name, wanted, files, len(examples))


def _official(examples: list[dict]) -> dict[str, str]:
    """Prediction files as the official scripts read them.

    `predictions.json` is HotPotQA's and 2WikiMultiHopQA's (whose script also asks for `evidence`); StrategyQA's is
    written where every question is one of yes or no.
    """
    said = {example["id"]: example["prediction"] for example in examples}
    files = {"predictions.json": {"answer": said, "sp": {}, "evidence": {}}}
    if all(example["scores"]["accuracy"] is not None for example in examples):
        truth = lambda text: {"answer": answers.yes_no(text), "decomposition": [], "paragraphs": []}
        files["predictions_strategyqa.json"] = {i: truth(text) for i, text in said.items()}
    return {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in files.items()}


def check_questions(config) -> None:
    """Check what the held-out questions are, before anything expensive.

    Raises:
      UserError: there is no such file, or they are synthetic while the training questions are user data.
    """
    options.require_files(config, "data.eval")
    if config.data.eval == "synthetic" and (config.data.train != "synthetic" or config.data.pairs):
        raise UserError(
            "config.data.eval='synthetic': the adapter would be evaluated on synthetic questions; name held-out "
            "ones of yours, or train without evaluation (config.train.evaluate=False)."
        )
    if config.data.eval == config.data.train != "synthetic":
        print("Warning: config.data.eval is config.data.train; scores on questions that were trained on say little.")


def run(config) -> None:
    """The command."""
    workdir, session = Workdir(config.workdir), Session(config)
    check_questions(config)
    with workdir.lock():
        results = {}
        for system in systems(config, workdir):
            every = [(K, noise) for K in config.evaluate.passages or [None] for noise in config.evaluate.noise]
            for passages, noise in [(None, "none")] if system == "closed_book" else every:
                name = artifact(system, passages, noise).removeprefix("eval/")
                results[name] = make(session, workdir, system, passages, noise)
        print(f"\n{summary(workdir / 'eval', results)}\n")
        print("Wrote " + ", ".join(str(workdir / "eval" / name) for name in results) + ".")


if __name__ == "__main__":
    cli.main(run, __doc__)
