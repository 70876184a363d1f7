"""Every option: its default, what it means, which values it takes, and which options only make sense together.

`roserag train --options` prints the table below. A misspelt option or a value of the wrong type stops the command at
once. To add an option, add one `Option`; what depends on other options is a small function under `@together` beside its
section, which yields `(option, what is wrong)`.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from roserag_jax.errors import UserError
from roserag_jax.preference.selection import STRATEGIES
from roserag_jax.rag import noise
from roserag_jax.rag.answers import METRICS
from roserag_jax.rag.chat import TEMPLATE_ARGUMENTS, check_template_arguments
from roserag_jax.rag.corpora import CHUNK_TITLES
from roserag_jax.rag.layouts import READERS
from roserag_jax.retrieval.registry import RETRIEVERS
from roserag_jax.training import losses


def not_utf8(value: Any) -> str | None:
    """What is wrong with a text that has bytes which are not UTF-8; JSON and most libraries cannot name such a file."""
    texts = value if isinstance(value, list | tuple) else [value]
    found = [text for text in texts if isinstance(text, str) and re.search("[\ud800-\udfff]", text)]
    return "is not UTF-8 text; rename the file or folder" if found else None


class Option(NamedTuple):
    """A default, one line of help, and the values that are allowed.

    Args:
      check: returns what is wrong with a value by itself, or None.
    """

    default: Any
    help: str
    choices: tuple = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    check: Callable[[Any], str | None] | None = None

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as a phrase; None if it is allowed."""
        if why := not_utf8(value):
            return why
        if self.choices and value not in self.choices:
            return f"choose one of {', '.join(map(str, self.choices))}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most}"
        if self.above is not None and value <= self.above:
            return f"must be more than {self.above}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below}"
        return self.check(value) if self.check else None


Faults = Iterator[tuple[str, str]]
_TOGETHER: list[Callable[[ConfigDict], Faults]] = []


def together(check: Callable[[ConfigDict], Faults]) -> Callable[[ConfigDict], Faults]:
    """Register a check of options that only make sense together."""
    _TOGETHER.append(check)
    return check


GENERAL = {
    "model": Option("", "base model: a Hub id, a local Hugging Face folder or a .gguf file"),
    "revision": Option("", "branch, tag or commit of the model's Hub id; empty is the default branch"),
    "tokenizer": Option("", "Hub id or folder of the tokenizer; empty uses the model's own"),
    "dtype": Option(
        "bfloat16",
        "type of the frozen weights and activations; the adapter and sums are float32",
        ("float32", "bfloat16"),
    ),
    "seed": Option(
        0,
        "seed of everything that is drawn: samples, the adapter's initialization and dropout, the order of the pairs, "
        "which pairs are held out, random selection, noise",
        at_least=0,
        at_most=2**32 - 1,  # JAX takes the rest of a larger one
    ),
    "workdir": Option("", "folder that every result goes to; local, or gs:// with the extra 'gcs'"),
    "index": Option(
        "",
        "folder of the index of retrieve.corpus, built by the command `index` or by the first that needs it; empty is "
        "one in the user's cache",
    ),
    "adapter": Option("", "PEFT folder that evaluate, export, answer and score use; empty is WORKDIR/adapter"),
    "distributed": Option(
        "",
        "how several processes of one run find each other: 'auto' on a TPU pod or under Slurm, else "
        "'HOST:PORT,PROCESSES,INDEX'; empty is a single process",
    ),
    "join_seconds": Option(120, "how long several processes wait for all of them to join", at_least=1),
    "watchdog_seconds": Option(
        120,
        "several processes end with status 134 when one of them gives no sign of life, or finishes no training step or "
        "question, for so long, compilation aside, and ten times as long as ever before; 0 is never",
        at_least=0,
    ),
    "merge": Option(False, "merge the adapter into a copy of the weights before decoding: faster, for more memory"),
}

MESH = {
    "data": Option(
        -1, "number of devices over which batches are split and weights are replicated; -1 takes all that remain"
    ),
    "fsdp": Option(
        1, "number of devices over which batches and weights are split: for weights that do not fit on one (-1, data=1)"
    ),
    "tensor": Option(1, "number of devices over which heads, MLP and vocabulary are split"),
}


DATA = {
    "train": Option(
        "synthetic",
        "training questions: a .json or .jsonl file, plain or .gz, "
        "hf://owner/name[@revision][/configuration][:split], or 'synthetic'",
    ),
    "eval": Option("synthetic", "held-out questions, named in the same way"),
    "format": Option("auto", "layout of both files; auto detects it from the first row", ("auto", *READERS)),
    "language": Option("", "language of the questions, for evaluate.metric: 'de', 'zh' (MLQA) or 'zh_cn' (MKQA), ..."),
    "pairs": Option("", "ready-made pairs, TRL's {prompt, chosen, rejected}, to train on instead of generated ones"),
    "train_rows": Option(0, "number of training rows to use, from the first; 0 is all (synthetic: 200)", at_least=0),
    "eval_rows": Option(0, "number of held-out rows to use, from the first; 0 is all (synthetic: 100)", at_least=0),
    "synthetic_seed": Option(0, "seed of the synthetic world and its questions", at_least=0),
    "synthetic_passages": Option(5, "number of passages of a synthetic question", at_least=2),
    "synthetic_missing_gold": Option(
        0.0, "fraction of the synthetic questions that lack a gold passage", at_least=0, at_most=1
    ),
    "synthetic_counterfactual": Option(
        0.0, "fraction of the synthetic questions that have a passage with a wrong answer", at_least=0, at_most=1
    ),
}

RETRIEVE = {
    "retriever": Option(
        "given",
        "where passages come from: 'given' keeps those of the questions' rows, "
        + ", ".join(f"'{name}' {spec.help}" for name, spec in RETRIEVERS.items()),
        ("given", *RETRIEVERS),
    ),
    "corpus": Option(
        "",
        "corpus to search: rows of {id, contents} or {id, title, text} (a file or hf://), StrategyQA's paragraphs, or "
        "a folder of documents (text, Markdown; HTML, PDF and .docx with the extra 'documents'); used by bm25, answer, "
        "noise and StrategyQA's evidence",
    ),
    "chunk_words": Option(120, "length of a passage of a document in words, about", at_least=10),
    "chunk_overlap": Option(0, "number of words that a passage of a document repeats from the one before", at_least=0),
    "chunk_title": Option(
        "file", "title of a document's passages: its file's name, that and the heading, or none", CHUNK_TITLES
    ),
    "cache": Option("", "FlashRAG's retrieval_cache.json, or a folder of such files"),
    "server": Option("", "URL of a server with POST /retrieve, such as that of `retrieve --serve`"),
    "k": Option(10, "number of passages that bm25 or the cache returns for a question", at_least=1),
}


@together
def _retriever_has_its_source(config) -> Faults:
    retrieve = config.retrieve
    for name, spec in RETRIEVERS.items():
        for option in spec.needs if name == retrieve.retriever else ():
            if not retrieve[option] and not (option == "corpus" and config.index):
                yield f"retrieve.{option}", f"{name} needs it: {RETRIEVE[option].help}"
        for option in spec.only if name != retrieve.retriever else ():
            if retrieve[option]:
                yield f"retrieve.{option}", f"is read with config.retrieve.retriever={name} only"


@together
def _chunks_move_on(config) -> Faults:
    if config.retrieve.chunk_overlap >= config.retrieve.chunk_words:
        yield "retrieve.chunk_overlap", f"must be less than config.retrieve.chunk_words={config.retrieve.chunk_words}"


@together
def _enough_passages_are_retrieved(config) -> Faults:
    if config.retrieve.retriever == "given":
        return
    if config.retrieve.k < config.prompt.passages:
        yield "retrieve.k", f"is less than config.prompt.passages={config.prompt.passages}"
    if config.retrieve.k < max(config.evaluate.passages, default=0):
        yield "retrieve.k", f"is less than the largest of config.evaluate.passages={config.evaluate.passages}"


def _stop_strings(value) -> str | None:
    good = all(isinstance(text, str) and text for text in value)
    return None if good else "a tuple of texts that are not empty"


def _template_arguments(value) -> str | None:
    try:
        check_template_arguments(value)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


PROMPT = {
    "passages": Option(10, "number of passages shown (K); 0 is closed book", at_least=0),
    "order": Option(
        "best_first",
        "order of the passages shown; some small models mostly read the one before the question: best_last helps those",
        ("best_first", "best_last"),
    ),
    "examples": Option(
        0, "number of few-shot demonstrations, at most 2; they help the smallest models", at_least=0, at_most=2
    ),
    "max_tokens": Option(2048, "most tokens of a prompt; passages are cut to fit, the question never is", at_least=1),
    "stop": Option(
        (),
        "stop strings, which end a response as the end-of-turn token does; for models that run on",
        check=_stop_strings,
    ),
    "template_arguments": Option(
        TEMPLATE_ARGUMENTS,
        "variables of the model's chat template; date_string is the date of templates that write today's, "
        "enable_thinking lets models think before they answer; a configuration file may add others",
        check=_template_arguments,
    ),
}


GENERATE = {
    "guided_samples": Option(4, "rationales sampled per question with the golden answer in view", at_least=0),
    "plain_samples": Option(4, "rationales sampled per question from the plain prompt", at_least=0),
    "guided_temperature": Option(0.8, "sampling temperature of the guided rationales", at_least=0),
    "plain_temperature": Option(0.8, "sampling temperature of the plain rationales", at_least=0),
    "top_p": Option(
        0.95, "probability mass of the nucleus that is sampled from; 1.0 is the whole vocabulary", above=0, at_most=1
    ),
    "top_k": Option(0, "sample from this many most likely tokens; 0 is the whole vocabulary", at_least=0),
    "min_p": Option(
        0.0,
        "leave out tokens less likely than this fraction of the most likely one; 0.0 leaves out none",
        at_least=0,
        at_most=1,
    ),
    "max_tokens": Option(128, "most tokens of a rationale", at_least=1),
    "samples": Option(
        "", "a .jsonl of {id, samples: [...]}: responses made elsewhere, verified beside the sampled ones"
    ),
    "answer": Option(
        "decoded",
        "which answer of a rationale is judged: one decoded after it on the plain prompt, or the one sampled with it",
        ("decoded", "sampled"),
    ),
    "answer_tokens": Option(24, "most tokens of the answer decoded after a rationale", at_least=1),
    "batch": Option(
        8, "questions decoded at a time, rounded up to the devices; a new one starts when one is finished", at_least=1
    ),
    "memory_gb": Option(
        0.0, "most memory for the caches and logits of `generate`, which lowers its batch; 0.0 is no limit", at_least=0
    ),
}


@together
def _a_pair_needs_two_candidates(config) -> Faults:
    sampled = config.generate.guided_samples + config.generate.plain_samples
    if sampled < 2 and not (config.generate.samples or config.data.pairs):
        why = "a pair needs at least two candidates; raise it or config.generate.guided_samples"
        yield "generate.plain_samples", why


SELECT = {
    "strategy": Option(
        "hard",
        "which correct and which incorrect candidate make the pair: "
        + ", ".join(f"{strategy.help} ({name})" for name, strategy in STRATEGIES.items()),
        (*STRATEGIES,),
    ),
    "match": Option(
        "em", "whether a correct answer equals a golden one (em) or contains it (contains)", ("em", "contains")
    ),
    "rejection": Option(
        True,
        "check that chosen responses are correct and rejected ones incorrect; False (the paper's ablation) selects "
        "among all guided and all plain ones, unchecked",
    ),
    "evidence": Option(
        1,
        "words of the passages, beyond the answer's, that a chosen rationale must hold; 0 lets it restate the hint",
        at_least=0,
    ),
    "supported": Option(False, "leave out questions whose answer no passage holds (except yes/no questions)"),
    "confidence": Option(
        "mean", "confidence in a response: its log-probability per token (mean) or in total (sum)", ("mean", "sum")
    ),
}


@together
def _selection_without_rejection(config) -> Faults:
    if config.select.rejection:
        return
    if not (config.generate.guided_samples and config.generate.plain_samples):
        yield "select.rejection", "without it both config.generate.guided_samples and plain_samples are needed"
    if config.select.supported:
        yield "select.supported", "without config.select.rejection nothing is checked"


PROJECTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _projections(value) -> str | None:
    if unknown := set(value) - set(PROJECTION_NAMES):
        return f"{sorted(unknown)} unknown; known: {', '.join(PROJECTION_NAMES)}"
    return None if value else "name at least one projection"


LORA = {
    "rank": Option(16, "rank of the LoRA adapter", at_least=1),
    "alpha": Option(32.0, "scale of the LoRA adapter: its product is multiplied by alpha / rank", above=0),
    "dropout": Option(0.0, "dropout probability on the adapter's input while training", at_least=0, below=1),
    "rslora": Option(False, "scale the adapter by alpha / sqrt(rank) instead (rsLoRA)"),
    "targets": Option(PROJECTION_NAMES, "projections that get an adapter", check=_projections),
    "start": Option("", "PEFT folder of an adapter that training starts from; empty starts a new one"),
}


TRAIN = {
    "loss": Option("orpo", f"loss that is minimized ({losses.describe()})", (*losses.LOSSES,)),
    "beta": Option(
        0.1,
        "weight of ORPO's odds-ratio term (less than 0.5 in the paper); the scale of the reward in the other losses",
        at_least=0,
    ),
    "gamma": Option(0.5, f"target reward margin; for {losses.users('gamma')}", at_least=0),
    "sft_weight": Option(1.0, f"weight of the supervised term; for {losses.users('sft_weight')}", at_least=0),
    "sft_span": Option(
        "response",
        f"tokens that the supervised term covers, for {losses.users('sft_span')}; with the prompt it is TRL's, a mean "
        "over the batch's tokens",
        ("response", "prompt+response"),
    ),
    "label_smoothing": Option(
        0.0,
        f"fraction of the pairs assumed to have flipped labels; for {losses.users('label_smoothing')}",
        at_least=0,
        below=0.5,
    ),
    "learning_rate": Option(
        2e-4, "peak learning rate, reached after the warm-up and followed by a cosine to zero", at_least=0
    ),
    "warmup": Option(0.1, "warm-up fraction of the steps", at_least=0, at_most=1),
    "weight_decay": Option(0.0, "weight decay of AdamW on the adapter", at_least=0),
    "clip": Option(1.0, "max gradient norm; a larger gradient is scaled down to it", above=0),
    "epochs": Option(2, "number of passes over the pairs", at_least=1),
    "batch": Option(
        8, "pairs per step; the mesh.data x mesh.fsdp devices take equal shares of each microbatch", at_least=1
    ),
    "accumulate": Option(
        1,
        "gradient-accumulation steps: microbatches that a step's batch is split into; the same result without dropout",
        at_least=1,
    ),
    "max_response": Option(
        192, "most tokens of a response; pairs with a longer one are left out and counted", at_least=1
    ),
    "max_length": Option(
        0,
        "most tokens of a prompt with a response; passages are cut to fit, nothing else is; 0 is no limit",
        at_least=0,
    ),
    "held_out": Option(
        0.0,
        "fraction of the questions whose pairs are held out from training and evaluated instead",
        at_least=0,
        below=1,
    ),
    "evaluate_every": Option(
        50,
        "steps between evaluations on the held-out pairs, which are also evaluated before and after training",
        at_least=1,
    ),
    "answer_questions": Option(
        0, "number of held-out questions answered at each of these evaluations, for EM and F1; 0 is none", at_least=0
    ),
    "keep": Option(
        "latest",
        "checkpoint that becomes the adapter; best is by F1 where questions are answered, else by held-out loss",
        ("latest", "best"),
    ),
    "nonfinite": Option(
        "stop", "what to do about a non-finite loss or gradient (NaN or Inf): stop, or skip the step", ("stop", "skip")
    ),
    "remat": Option(
        "layer",
        "what the backward pass recomputes to save memory: nothing, whole layers, or all but matmuls (dots)",
        ("none", "layer", "dots"),
    ),
    "checkpoint_every": Option(50, "steps between checkpoints", at_least=1),
    "keep_checkpoints": Option(2, "number of latest checkpoints to keep", at_least=1),
    "profile_steps": Option(
        0, "number of steps to trace for TensorBoard's profiler, after two that warm up; 0 is none", at_least=0
    ),
    "wandb": Option("", "Weights & Biases project that the training curve also goes to; empty is none"),
    "evaluate": Option(True, "make `train` evaluate the base model before training and the adapter after it"),
}


@together
def _hyperparameters_belong_to_the_loss(config) -> Faults:
    defaults = {name: option.default for name, option in TRAIN.items()}
    for name, why in losses.faults(config.train, defaults):
        yield f"train.{name}", why


@together
def _held_out_pairs_exist(config) -> Faults:
    for name, off in (("answer_questions", 0), ("keep", "latest")):
        if config.train[name] != off and not config.train.held_out:
            yield f"train.{name}", "needs held-out pairs; set config.train.held_out, for example to 0.1"
    if config.train.answer_questions and config.data.pairs:
        why = "pairs made elsewhere (config.data.pairs) have no golden answers; set it to 0"
        yield "train.answer_questions", why


@together
def _microbatches_are_equal(config) -> Faults:
    if config.train.batch % config.train.accumulate:
        yield "train.accumulate", f"must divide config.train.batch={config.train.batch}"


def _systems(value) -> str | None:
    good = not set(value) - {"closed_book", "base", "adapter"}
    return None if good else "a tuple of 'closed_book', 'base' and 'adapter'"


def _numbers_of_passages(value) -> str | None:
    good = all(isinstance(K, int) and K >= 1 for K in value)
    return None if good else "a tuple of numbers from 1; 'closed_book' is a system of its own"


def _noise_conditions(value) -> str | None:
    try:
        for name in value or [""]:
            noise.parse(name)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


EVALUATE = {
    "systems": Option(
        ("base", "adapter"), "systems to compare, of 'closed_book', 'base' and 'adapter'", check=_systems
    ),
    "adapters": Option(
        (), "PEFT folders to compare as well; each is called by its name, or its parent's if it is 'adapter'"
    ),
    "passages": Option(
        (), "numbers of passages (K) to compare; empty is prompt.passages alone", check=_numbers_of_passages
    ),
    "noise": Option(
        ("none",),
        f"noise conditions to compare: {noise.describe()}",
        check=_noise_conditions,
    ),
    "metric": Option(
        "hotpotqa",
        "how exact match and F1 are computed, here and where candidates are judged: "
        + ", ".join(f"{metric.help} ({name})" for name, metric in METRICS.items()),
        (*METRICS,),
    ),
    "max_tokens": Option(160, "most tokens of a response", at_least=1),
    "batch": Option(16, "questions decoded at a time", at_least=1),
}


@together
def _metric_is_defined_for_the_language(config) -> Faults:
    languages = METRICS[config.evaluate.metric].languages
    if languages and config.data.language not in languages:
        yield "data.language", f"config.evaluate.metric={config.evaluate.metric} needs one of {', '.join(languages)}"
    if config.data.language and not languages:
        yield "data.language", f"config.evaluate.metric={config.evaluate.metric} has no languages; use mlqa or mkqa"


@together
def _something_is_evaluated(config) -> Faults:
    if not (config.evaluate.systems or config.evaluate.adapters):
        yield "evaluate.systems", "name at least one system, or one of config.evaluate.adapters"


@together
def _noise_needs_passages(config) -> Faults:
    shown = config.prompt.passages or config.evaluate.passages
    if not shown and set(config.evaluate.noise) != {"none"}:
        yield "evaluate.noise", "config.prompt.passages=0 shows no passages; set it or config.evaluate.passages"


EXPORT = {"folder": Option("", "folder that the merged model is written to; empty is WORKDIR/merged")}

OPTIONS: dict[str, dict[str, Option] | Option] = GENERAL | {
    "mesh": MESH,
    "data": DATA,
    "retrieve": RETRIEVE,
    "prompt": PROMPT,
    "generate": GENERATE,
    "select": SELECT,
    "lora": LORA,
    "train": TRAIN,
    "evaluate": EVALUATE,
    "export": EXPORT,
}


def defaults() -> ConfigDict:
    """A locked `ConfigDict` of all options at their defaults; configuration files start from it."""
    tree = {
        name: {k: option.default for k, option in entry.items()} if isinstance(entry, dict) else entry.default
        for name, entry in OPTIONS.items()
    }
    return ConfigDict(tree).lock()


def walk() -> Iterator[tuple[str, Option]]:
    """Every option with its dotted name."""
    for name, entry in OPTIONS.items():
        if isinstance(entry, dict):
            yield from ((f"{name}.{k}", option) for k, option in entry.items())
        else:
            yield name, entry


def get(config: ConfigDict, dotted: str) -> Any:
    """The value of an option by its dotted name."""
    for part in dotted.split("."):
        config = config[part]
    return config


def subset(config: ConfigDict, *names: str, without: tuple[str, ...] = ()) -> dict:
    """The options of the given names and sections, flat and by dotted name: what an artifact depends on."""
    wanted = lambda name: any(name == n or name.startswith(f"{n}.") for n in names)
    plain = lambda value: value.to_dict() if isinstance(value, ConfigDict) else value
    return {name: plain(get(config, name)) for name, _ in walk() if wanted(name) and name not in without}


def describe() -> str:
    """All options as text: name, default, help and choices."""
    lines = []
    for name, option in walk():
        choices = f" ({', '.join(map(str, option.choices))})" if option.choices else ""
        lines.append(f"  --config.{name}={option.default!r}\n      {option.help}{choices}")
    return "\n".join(lines)


def validate(config: ConfigDict, workdir: bool = True, model: bool = True) -> None:
    """Check everything that can be checked before anything expensive.

    Args:
      workdir: whether the command needs `config.workdir`.
      model: whether it needs `config.model`.

    Raises:
      UserError: naming the option, its value and what is allowed.
    """

    def fail(name: str, why: str):
        raise UserError(f"config.{name}={get(config, name)!r}: {why}.")

    for name, option in walk():
        if why := option.fault(get(config, name)):
            fail(name, why)
    for check in _TOGETHER:
        for name, why in check(config):
            fail(name, why)
    if model and not config.model:
        fail("model", "name a Hub id, a Hugging Face folder or a .gguf file, or a --config file that does")
    if workdir and not config.workdir:
        fail("workdir", "name the folder that every result goes to")


def require_files(config: ConfigDict, *names: str) -> None:
    """Check that the local files exist that the options name, and those that passages come from.

    Raises:
      UserError: one does not exist.
    """
    for name in (*names, "retrieve.corpus", "retrieve.cache"):
        value = get(config, name)
        if value and value != "synthetic" and "://" not in value and not os.path.exists(os.path.expanduser(value)):
            raise UserError(f"config.{name}={value!r}: there is no such file or folder.")
