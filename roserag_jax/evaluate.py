"""Answer the held-out questions with several systems, score the answers and compare them.

    python -m roserag_jax.evaluate --config configs/quickstart.py [--config.evaluate.systems="('closed_book', 'base')"]
        [--config.evaluate.passages="(1, 5)"] [--config.evaluate.noise="('none', 'random3')"]

Reads `retrieved_eval.jsonl` and the adapters, writes `eval/base/`, `eval/adapter/`, or `eval/adapter-k5-random3/` for
five passages and three random ones, each with `metrics.json`, `predictions.json` (the official scripts' format) and
`examples.jsonl` (prompt, completion and scores of each question).
"""

import contextlib
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator

from etils import epath

from roserag_jax import cli, options, rates, retrieve
from roserag_jax.ahead import in_order
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError
from roserag_jax.hub.encoder import encoder_fingerprint, resolve_encoder
from roserag_jax.inference.requests import DecoderCapacity
from roserag_jax.inference.respond import NumberedPrompt, respond
from roserag_jax.inference.scheduler import length_classes
from roserag_jax.inputs import corpus_recipe
from roserag_jax.partial_results import PartialResults
from roserag_jax.progress import Progress
from roserag_jax.rag import answers, metrics, questions
from roserag_jax.rag.chat import opens_thoughts
from roserag_jax.rag.noise import Noise, parse
from roserag_jax.rag.prompts import BUILDERS, Prompt, PromptBuilder, estimate_lengths
from roserag_jax.report.comparison import summary
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.bert_score import BertScore
from roserag_jax.retrieval.bm25 import BM25
from roserag_jax.retrieval.indexing import open_index
from roserag_jax.session import Session, adapter_digest, adapter_folder, checked_adapter
from roserag_jax.workdir import RETRIEVED, Recipe, RowFile, Workdir, from_jsonl, resolve_path, to_json, to_jsonl

_SIMILARITY = ("evaluate.similarity", "evaluate.encoder")


def _ends_like_an_evaluation(name: str) -> bool:
    """Whether a name ends as that of an evaluation with other passages or noise; see `artifact`."""
    _, dash, end = name.lower().rpartition("-")
    with contextlib.suppress(ValueError):  # no noise is called so
        return bool(dash and (re.fullmatch(r"k\d+", end) or parse(end)))
    return False


def systems(config) -> dict[str, epath.Path | None]:
    """The systems to compare by name; those of `evaluate.adapters`, with their folder, are called by its name.

    Raises:
      UserError: two adapters have one name, one's name could be that of an evaluation, or one is absent or damaged.
    """
    found = dict.fromkeys(config.evaluate.systems)
    for folder in map(resolve_path, config.evaluate.adapters):
        name = folder.parent.name if folder.name == "adapter" else folder.name
        name = re.sub(r"[^\w-]+", "_", name) or "root"
        taken = {other.lower() for other in (*found, "closed_book", "base", "adapter")}  # some file systems ignore case
        if name.lower() in taken or _ends_like_an_evaluation(name):
            why = "is taken" if name.lower() in taken else "is how an evaluation with other passages or noise is called"
            raise UserError(f"config.evaluate.adapters: {folder} would be called {name!r}, which {why}; rename it.")
        found[name] = checked_adapter(folder)
    if config.adapter and "adapter" in found:  # the workdir's own may be yet to come
        checked_adapter(config.adapter)
    return found


def artifact(system: str, passages: int | None, noise: str) -> str:
    """The artifact of one evaluation: eval/base, eval/base-k5, eval/adapter-k5-random3."""
    if system == "closed_book":
        return "eval/closed_book"
    return f"eval/{system}" + (f"-k{passages}" if passages else "") + (f"-{noise}" if noise != "none" else "")


def recipe(session: Session, workdir: Workdir, folder: epath.Path | None, passages: int, noise: str) -> Recipe:
    """What an evaluation is made from."""
    config = session.config
    names = [*Session.model_options, "prompt", "data.language", "evaluate.metric", "evaluate.max_tokens"]
    inputs = {RETRIEVED["eval"]: workdir.verify(RETRIEVED["eval"])} | session.model_inputs
    if folder is not None:
        inputs["adapter"] = adapter_digest(folder)
    changed = {"prompt.passages": passages, "evaluate.noise": noise}
    if noise != "none":
        corpus_names, corpus_inputs = corpus_recipe(config)
        names, inputs = [*names, "seed", *corpus_names], inputs | corpus_inputs
    return Recipe(options.subset(config, *names) | changed, inputs)


def _with_similarity(config, answering: Recipe) -> Recipe:
    """What an evaluation is made from: its answers' recipe, and the measures of similarity where there are any."""
    inputs = {}
    if name := config.evaluate.encoder:
        inputs["config.evaluate.encoder"] = encoder_fingerprint(name, "evaluate.encoder")
    return Recipe(answering.options | options.subset(config, *_SIMILARITY), answering.inputs | inputs)


def _is_answered(workdir: Workdir, name: str, answering: Recipe) -> bool:
    """Whether a finished evaluation has the answers of this recipe, whatever they are measured by."""
    if not (manifest := workdir.manifest(name)):
        return False
    inputs = {key: value for key, value in manifest["inputs"].items() if not key.startswith("config.evaluate.encoder")}
    kept = {key: value for key, value in manifest["options"].items() if key not in _SIMILARITY}
    return Recipe(kept, inputs).fingerprint() == answering.fingerprint()


class ShownRows:
    """The held-out questions with the contexts that are shown: the first K, and what the noise makes of them.

    Noise comes from the corpus that is named, else from the contexts of all rows. A row also says how many gold
    passages there are, shown or not. Without noise, rows are read one by one.
    """

    def __init__(self, config, file: RowFile, passages: int, noise: str):
        self.file, self.passages, self.noise = file, passages, None
        if noise == "none":
            return
        rows = [self._with_gold_count(row) for row in file]
        if config.retrieve.corpus or config.index:
            searched = open_index(config)
            pool, index = searched.passages, lambda: searched
        else:
            contexts = [c for row in rows for c in row.get("contexts", [])]
            pool = list({(c["title"], c["text"]): c for c in contexts}.values())
            index = lambda: BM25(pool)
        self.noise = Noise(noise, config.seed, rows, pool, index)

    def __getitem__(self, i: int) -> dict:
        row = self._with_gold_count(self.file[i])
        if self.noise:
            return {**row, "contexts": self.noise.passages(row, self.passages)}
        return {**row, "contexts": row.get("contexts", [])[: self.passages]}

    @staticmethod
    def _with_gold_count(row: dict) -> dict:
        return {**row, "gold_count": metrics.gold_count(row)}


def _answer(
    session: Session, engine, rows: ShownRows, builder: PromptBuilder, numbers: Iterable[int], *, classes, slots: int
) -> Iterator[dict]:
    """Answer the questions with these numbers; yields each with its scores as soon as it is finished."""
    config = session.config
    measure = answers.Measure(config.evaluate.metric, config.data.language)
    answered: dict[int, tuple[dict, Prompt]] = {}  # those that are being answered

    def build(number: int) -> NumberedPrompt:
        row = rows[number]
        prompt = builder.plain(row)
        answered[number] = row, prompt
        return NumberedPrompt(number, prompt.tokens)

    responses = respond(
        engine,
        session.tokenizer,
        in_order(build, numbers, threads=BUILDERS, ahead=slots),
        classes=classes,
        shared_prefix=builder.common_tokens(),
        slots=slots,
        max_new_tokens=config.evaluate.max_tokens,
        stop_strings=builder.stop,
    )
    clock = time.monotonic()
    for response in responses:
        row, prompt = answered.pop(response.number)
        rationale, prediction, parsed = answers.parse(response.text, opens_thoughts(prompt.text), builder.answer_line)
        now = time.monotonic()
        yield {
            "id": row["id"],
            "question": row["question"],
            "golden_answers": row["golden_answers"],
            "prediction": prediction,
            "rationale": rationale,
            "response": response.text,
            "finished": response.finished,
            "scores": metrics.score_row(row, prediction, parsed, measure),
            "prompt_tokens": len(prompt.tokens),
            "response_tokens": response.tokens,
            "prompt_cut": prompt.cut,
            "prompt": prompt.text,
            "seconds": now - clock,
        }
        clock = now


def make(
    session: Session,
    workdir: Workdir,
    system: str,
    passages: int | None = None,
    noise: str = "none",
    adapter: epath.Path | None = None,
) -> dict:
    """Bring one evaluation up to date and return its metrics.

    Args:
      system: 'closed_book', 'base', 'adapter' or the name of one of `evaluate.adapters`.
      passages: K; None is `prompt.passages`.
      noise: a condition of `rag.noise`.
      adapter: that of a system which the configuration does not name.
    """
    config, name = session.config, artifact(system, passages, noise)
    with processes.main_first():
        retrieve.make(config, workdir, ("eval",))
    folder = adapter or (adapter_folder(config, workdir) if system == "adapter" else systems(config).get(system))
    K = 0 if system == "closed_book" else passages or config.prompt.passages
    answering = recipe(session, workdir, folder, K, noise)
    wanted = _with_similarity(config, answering)
    if workdir.is_up_to_date(name, wanted):
        return json.loads((workdir / name / "metrics.json").read_text())
    about = {"system": system, "passages": K, "noise": noise}
    if _is_answered(workdir, name, answering):
        print(f"{name}: its answers are kept and scored anew.")
        with processes.main_first():
            if processes.is_main():
                _publish(config, workdir, name, wanted, _answered(workdir, name), about)
        return json.loads((workdir / name / "metrics.json").read_text())
    # The contexts of a row are all that its prompt shows; how many that may be is said by K and the noise.
    builder = PromptBuilder(session.tokenizer, **{**config.prompt, "passages": K and sys.maxsize})
    first = lambda row: {**row, "contexts": row.get("contexts", [])[:K]}
    note = lambda row: (row["id"], len(row.get("contexts", [])), builder.size(first(row)))
    file = workdir.row_file(RETRIEVED["eval"], note)
    if passages and passages > (most := max(count for _, count, _ in file.notes)):
        raise UserError(f"config.evaluate.passages: no question has {passages} passages, at most {most}.")
    rows = ShownRows(config, file, K, noise)
    label = name.removeprefix("eval/")
    ids = [each for each, *_ in file.notes]
    partial = PartialResults(
        workdir, f"evaluate-{label}", answering.fingerprint(), ids, lambda example: example["scores"]["em"]
    )
    progress = Progress(
        f"evaluate {label}",
        len(ids),
        "questions",
        len(partial.done),
        workdir=workdir,
        rate=rate_key(config, system, K),
    )
    lengths = estimate_lengths(
        [size for *_, size in file.notes], lambda i: len(builder.plain(rows[i]).tokens), builder.max_tokens
    )
    limit = config.evaluate.max_tokens
    slots = session.slots(config.evaluate.batch, DecoderCapacity(1, 1, ((1, limit),)), max(lengths), on_cpu=16)
    missing, em = {*partial.missing()}, sum(partial.done.values())
    order = [i for i in sorted(range(len(ids)), key=lambda i: (-lengths[i], i)) if i in missing]
    queue = processes.SharedQueue(f"evaluate {label}", order, slots)
    if len(queue):
        engine, classes = session.decoding_session.engine(folder), length_classes(lengths, slots)
        progress.phase(f"answering {len(queue)} questions")
        with processes.watched():
            for example in _answer(session, engine, rows, builder, queue, classes=classes, slots=slots):
                partial.add(example)
                processes.step()
                em += example["scores"]["em"]
                progress.update(len(partial.done), f"EM {100 * em / len(partial.done):.1f}")
    examples = list(partial.gather())
    with processes.main_first():
        if processes.is_main():
            if cut := sum(example["prompt_cut"] > 0 for example in examples):
                print(f"{cut} of {len(ids)} prompts were over {builder.max_tokens} tokens; their passages were cut.")
            _publish(config, workdir, name, wanted, examples, about)
            partial.clear()
    return json.loads((workdir / name / "metrics.json").read_text())


def rate_key(config, system: str, passages: int) -> str:
    """What the speed of an evaluation depends on, for `rates`."""
    return rates.key(config, "evaluate", passages=passages, adapter=system not in ("closed_book", "base"))


def _answered(workdir: Workdir, name: str) -> list[dict]:
    """The examples of a finished evaluation, without their similarity."""
    seconds = json.loads((workdir / name / "metrics.json").read_text())["seconds_per_question"]
    examples = from_jsonl((workdir / name / "examples.jsonl").read_text())
    for example in examples:
        example["seconds"] = seconds
        example["scores"] = {key: value for key, value in example["scores"].items() if key not in metrics.SIMILARITY}
    return examples


def _add_similarity(config, examples: list[dict]) -> None:
    """Add what `config.evaluate.similarity` names to the scores of examples."""
    said = [(example["prediction"], example["golden_answers"]) for example in examples]
    for name in config.evaluate.similarity:
        if name == "rouge_l":
            found = itertools.starmap(metrics.RougeL(), said)
        else:
            folder = resolve_encoder(config.evaluate.encoder, "evaluate.encoder")
            measure = BertScore(folder, local_mesh())
            found = measure(*zip(*said, strict=True))
            if measure.cut:
                print(f"Warning: {measure.cut} texts are over the encoder's {measure.length} word pieces and were cut.")
        for example, value in zip(examples, found, strict=True):
            example["scores"][name] = value


def _publish(config, workdir: Workdir, name: str, wanted: Recipe, examples: list[dict], about: dict) -> None:
    """Write an evaluation from its examples."""
    _add_similarity(config, examples)
    # Each is counted from when the one before was finished. Time is no function of the input: it stays out of the rows.
    seconds = statistics.fmean(example.pop("seconds") for example in examples)
    mean = lambda field: round(statistics.fmean(example[field] for example in examples), 1)
    result = about | metrics.summarize([example["scores"] for example in examples])
    result |= {field: mean(field) for field in ("prompt_tokens", "response_tokens")}
    result |= {"prompts_cut": sum(e["prompt_cut"] > 0 for e in examples), "seconds_per_question": round(seconds, 4)}
    files = {
        "metrics.json": to_json(result, indent=2),
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
    return {name: to_json(content, indent=1) for name, content in files.items()}


def check_questions(config) -> None:
    """Check what the held-out questions are, before anything expensive.

    Raises:
      UserError: there is no such file, or they are synthetic while the training questions are user data.
    """
    options.require_files(config, "data.eval")
    if "rouge_l" in config.evaluate.similarity:
        metrics.RougeL()
    if questions.source(config, "eval") == "synthetic" and (config.data.train != "synthetic" or config.data.pairs):
        raise UserError(
            "config.data.eval='synthetic': the adapter would be evaluated on synthetic questions; name held-out "
            "ones of yours, or train without evaluation (config.train.evaluate=False)."
        )
    if config.data.eval == config.data.train and config.data.train not in ("synthetic", questions.DOCUMENTS):
        print("Warning: config.data.eval is config.data.train; scores on questions that were trained on say little.")


def run(config) -> None:
    """The command."""
    workdir, session = Workdir(config.workdir), Session(config)
    check_questions(config)
    with workdir.lock():
        results = {}
        for system in systems(config):
            every = [(K, noise) for K in config.evaluate.passages or [None] for noise in config.evaluate.noise]
            for passages, noise in [(None, "none")] if system == "closed_book" else every:
                name = artifact(system, passages, noise).removeprefix("eval/")
                results[name] = make(session, workdir, system, passages, noise)
        print(f"\n{summary(workdir / 'eval', results)}\n")
        print("Wrote " + ", ".join(str(workdir / "eval" / name) for name in results) + ".")


if __name__ == "__main__":
    cli.main(run, __doc__)
