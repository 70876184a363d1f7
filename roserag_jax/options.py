"""Every option: its default, meaning and choices, and what only makes sense together.

`python -m roserag_jax.train --options` prints the list below. A misspelt option or a value of the wrong type stops the
command at once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from roserag_jax.errors import UserError
from roserag_jax.rag import noise
from roserag_jax.rag.layouts import READERS
from roserag_jax.rag.prompts import TEMPLATE_ARGUMENTS, check_template_arguments


class Option(NamedTuple):
    """A default and one line of meaning."""

    default: Any
    meaning: str
    choices: tuple = ()


PROJECTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FORMATS = ("auto", *READERS)

LOSSES = ("orpo", "sft", "dpo", "ipo", "simpo", "cpo")

OPTIONS: dict[str, dict[str, Option] | Option] = {
    "model": Option("", "Hub id, local Hugging Face folder or .gguf file of the base model"),
    "revision": Option("", "branch, tag or commit of a Hub id; empty is the default branch"),
    "tokenizer": Option("", "Hub id or folder of the tokenizer; empty takes the model's own"),
    "dtype": Option(
        "bfloat16", "of frozen weights and activations; adapters and sums are float32", ("float32", "bfloat16")
    ),
    "seed": Option(
        0,
        "of samples, the adapter's start and dropout, the order of training, held-out pairs, random selection, noise",
    ),
    "workdir": Option("", "folder for everything that is made; local, or gs:// with the extra 'gcs'"),
    "adapter": Option("", "PEFT folder used by evaluate, export, answer and score; empty is WORKDIR/adapter"),
    "distributed": Option(
        "", "processes of one run: 'auto' on a TPU pod or under Slurm, else 'HOST:PORT,PROCESSES,INDEX'; empty is one"
    ),
    "merge": Option(False, "fold the adapter into a copy of the weights before decoding: faster, for more memory"),
    "mesh": {
        "data": Option(1, "devices over which batches are split, weights copied"),
        "fsdp": Option(-1, "devices over which batches and weights are split; -1 takes all that are left"),
        "tensor": Option(1, "devices over which heads, MLP and vocabulary are split"),
    },
    "data": {
        "train": Option(
            "synthetic",
            "training questions: a .json or .jsonl file, plain or .gz, "
            "hf://owner/name[@revision][/configuration][:split], or 'synthetic'",
        ),
        "eval": Option("synthetic", "held-out questions, likewise"),
        "format": Option("auto", "layout of both files; auto tells it by the first row", FORMATS),
        "pairs": Option(
            "", "ready-made pairs, TRL's {prompt, chosen, rejected}, that take the place of generated ones"
        ),
        "train_rows": Option(0, "use the first so many training rows; 0 is all (synthetic: 200)"),
        "eval_rows": Option(0, "use the first so many held-out rows; 0 is all (synthetic: 100)"),
        "synthetic_seed": Option(0, "of the synthetic world and its questions"),
        "synthetic_passages": Option(5, "K of the synthetic rows"),
        "synthetic_missing_gold": Option(0.0, "share of synthetic rows that lack a gold passage"),
        "synthetic_counterfactual": Option(0.0, "share of synthetic rows with a passage that claims a wrong answer"),
    },
    "retrieve": {
        "retriever": Option(
            "given",
            "'given' keeps the rows' own contexts, 'bm25' searches the corpus, 'cache' looks questions up in a file",
            ("given", "bm25", "cache"),
        ),
        "corpus": Option(
            "",
            "rows of {id, contents}, StrategyQA's paragraphs, or a folder of .txt and .md files; for bm25, answer, "
            "noise and StrategyQA's evidence",
        ),
        "cache": Option("", "FlashRAG's retrieval_cache.json, or a folder of such files"),
        "k": Option(10, "passages fetched per question by bm25 or from the cache"),
    },
    "prompt": {
        "passages": Option(10, "K, passages shown; 0 is closed book"),
        "order": Option(
            "best_first",
            "of the passages shown; some small models mostly read the one before the question: best_last helps those",
            ("best_first", "best_last"),
        ),
        "examples": Option(0, "worked examples shown first, of at most 2; they help the smallest models"),
        "max_tokens": Option(2048, "limit of a prompt; passages are cut to fit, the question never is"),
        "stop": Option((), "texts that end a response, besides the model's end of turn; for models that run on"),
        "template_arguments": Option(
            TEMPLATE_ARGUMENTS,
            "variables of the model's chat template; date_string is the date of templates that write today's, "
            "enable_thinking lets models think before they answer; a configuration file may add others",
        ),
    },
    "generate": {
        "guided_samples": Option(4, "rationales sampled per question with the golden answer in view"),
        "plain_samples": Option(4, "rationales sampled per question from the plain prompt"),
        "guided_temperature": Option(0.8, "of their sampling"),
        "plain_temperature": Option(0.8, "of their sampling"),
        "top_p": Option(0.95, "nucleus that samples are drawn from; 1.0 is the whole vocabulary"),
        "top_k": Option(0, "draw from the so many likeliest tokens; 0 is the whole vocabulary"),
        "min_p": Option(0.0, "leave out tokens less likely than this share of the likeliest; 0.0 is none"),
        "max_tokens": Option(128, "limit of a rationale"),
        "samples": Option("", "a .jsonl of {id, samples: [...]}: responses made elsewhere, verified beside our own"),
        "answer": Option(
            "decoded",
            "the answer that is judged: decoded after the rationale on the plain prompt, or the one that was sampled",
            ("decoded", "sampled"),
        ),
        "answer_tokens": Option(24, "limit of the answer decoded after a rationale"),
        "batch": Option(8, "questions decoded at a time, rounded up to the devices; a finished one makes room at once"),
        "memory_gb": Option(0.0, "limit of caches and logits of `generate`; lowers its batch; 0.0 is none"),
    },
    "select": {
        "strategy": Option(
            "hard", "which correct and which incorrect candidate make the pair", ("hard", "easy", "random", "all")
        ),
        "match": Option("em", "a correct answer equals a golden one, or contains it", ("em", "contains")),
        "rejection": Option(
            True,
            "chosen are correct, rejected incorrect; without (the paper's ablation) the strategy picks among all "
            "guided and all plain ones, unchecked",
        ),
        "evidence": Option(
            1,
            "words of the passages, beyond the answer's, that a chosen rationale must hold; 0 lets it restate the hint",
        ),
        "supported": Option(False, "leave out questions whose answer no passage holds (those of yes or no aside)"),
        "confidence": Option("mean", "log-probability under the plain prompt per token or in sum", ("mean", "sum")),
    },
    "lora": {
        "rank": Option(16, "of the adapter"),
        "alpha": Option(32.0, "the adapter's product is scaled by alpha / rank"),
        "dropout": Option(0.0, "on the adapter's input while training"),
        "rslora": Option(False, "scale by alpha / sqrt(rank) instead (rsLoRA)"),
        "targets": Option(PROJECTION_NAMES, "projections that get an adapter"),
        "start": Option("", "PEFT folder of an adapter of this shape that training goes on from; empty is a new one"),
    },
    "train": {
        "loss": Option("orpo", "sft learns from the chosen responses alone, the others from pairs", LOSSES),
        "beta": Option(
            0.1, "weight of ORPO's odds-ratio term (the paper keeps it under 0.5); the others' reward scale"
        ),
        "gamma": Option(0.5, "SimPO's target margin"),
        "sft_weight": Option(1.0, "weight of CPO's likelihood term"),
        "sft_span": Option(
            "response",
            "of orpo's and sft's likelihood term; with the prompt it is TRL's, a mean over the batch's tokens",
            ("response", "prompt+response"),
        ),
        "label_smoothing": Option(0.0, "share of pairs taken to be the wrong way round; for dpo, simpo and cpo"),
        "learning_rate": Option(2e-4, "peak, reached after the warm-up, then a cosine to zero"),
        "warmup": Option(0.1, "share of the steps that warm up"),
        "weight_decay": Option(0.0, "AdamW's, on the adapter"),
        "clip": Option(1.0, "limit of the gradient's global norm"),
        "epochs": Option(2, "passes over the pairs"),
        "batch": Option(8, "pairs of a step; of each part of it, mesh.data x mesh.fsdp devices take equal shares"),
        "accumulate": Option(1, "parts that a step's batch is worked through in; the same result without dropout"),
        "max_response": Option(192, "longest response in tokens; pairs with a longer one are left out and counted"),
        "max_length": Option(
            0, "longest prompt with a response in tokens; passages are cut to fit, nothing else ever is; 0 is no limit"
        ),
        "held_out": Option(0.0, "share of the questions whose pairs are kept from training and evaluated instead"),
        "evaluate_every": Option(50, "steps between evaluations on the held-out pairs; also before and after training"),
        "answer_questions": Option(0, "questions of those pairs answered at each of them, for EM and F1; 0 is none"),
        "keep": Option(
            "latest",
            "checkpoint that becomes the adapter; best by F1 where questions are answered, else by held-out loss",
            ("latest", "best"),
        ),
        "nonfinite": Option(
            "stop", "what a loss or gradient that is no number does: stop, or skip the step", ("stop", "skip")
        ),
        "remat": Option("layer", "what the backward pass makes again to save memory", ("none", "layer", "dots")),
        "checkpoint_every": Option(50, "steps between checkpoints"),
        "keep_checkpoints": Option(2, "latest checkpoints kept while training"),
        "profile_steps": Option(0, "steps traced for TensorBoard's profiler, after two that warm up; 0 is none"),
        "wandb": Option("", "Weights & Biases project that the training curve also goes to; empty is none"),
        "evaluate": Option(True, "let `train` evaluate the base model before and the adapter after training"),
    },
    "evaluate": {
        "systems": Option(("base", "adapter"), "what `evaluate` compares, of 'closed_book', 'base' and 'adapter'"),
        "adapters": Option(
            (), "PEFT folders compared as well; each goes by its name, or its parent's if it is 'adapter'"
        ),
        "passages": Option((), "numbers of passages K to compare; empty is prompt.passages alone"),
        "noise": Option(
            ("none",),
            "conditions to compare: none, no_gold, shuffled, or passages added: random<n>, same_topic<n> (BM25's best "
            "for the question), counterfactual<n> (that state a wrong answer)",
        ),
        "max_tokens": Option(160, "limit of a response"),
        "batch": Option(16, "questions decoded at a time"),
    },
    "export": {
        "folder": Option("", "where the merged model goes; empty is WORKDIR/merged"),
    },
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
    """All options as text: name, default, meaning and choices."""
    lines = []
    for name, option in walk():
        choices = f" ({', '.join(map(str, option.choices))})" if option.choices else ""
        lines.append(f"  --config.{name}={option.default!r}\n      {option.meaning}{choices}")
    return "\n".join(lines)


def validate(config: ConfigDict, workdir: bool = True) -> None:
    """Check everything that can be checked before anything expensive.

    Args:
      workdir: whether the command needs `config.workdir`.

    Raises:
      UserError: naming the option, its value and what is allowed.
    """

    def fail(name, why):
        raise UserError(f"config.{name}={get(config, name)!r}: {why}.")

    for name, option in walk():
        if option.choices and get(config, name) not in option.choices:
            fail(name, f"choose one of {', '.join(map(str, option.choices))}")
    at_least = {
        1: "retrieve.k prompt.max_tokens generate.max_tokens generate.answer_tokens generate.batch lora.rank "
        "train.epochs train.batch train.accumulate train.max_response train.checkpoint_every train.keep_checkpoints "
        "train.evaluate_every evaluate.max_tokens evaluate.batch",
        0: "data.train_rows data.eval_rows prompt.passages generate.guided_samples generate.plain_samples "
        "generate.guided_temperature generate.plain_temperature generate.top_k generate.min_p generate.memory_gb "
        "select.evidence train.beta train.learning_rate train.weight_decay train.warmup lora.dropout train.max_length "
        "train.held_out train.answer_questions train.profile_steps train.gamma train.sft_weight seed "
        "data.synthetic_seed data.synthetic_missing_gold data.synthetic_counterfactual",
        2: "data.synthetic_passages",
    }
    for least, names in at_least.items():
        for name in names.split():
            if not get(config, name) >= least:  # nor NaN
                fail(name, f"must be at least {least}")
    for name in [
        "data.synthetic_missing_gold",
        "data.synthetic_counterfactual",
        "train.warmup",
        "generate.top_p",
        "generate.min_p",
    ]:
        if get(config, name) > 1:
            fail(name, "must be at most 1")
    positive = ["generate.top_p", "train.clip", "lora.alpha"]
    positive += [] if config.train.loss in ("sft", "orpo") else ["train.beta"]  # the others' scale
    for name in positive:
        if not get(config, name) > 0:
            fail(name, "must be positive")
    if not 0 <= config.prompt.examples <= 2:
        fail("prompt.examples", "must be 0, 1 or 2")
    if not 0 <= config.train.label_smoothing < 0.5:
        fail("train.label_smoothing", "must be at least 0 and under 0.5")
    if config.train.label_smoothing and config.train.loss not in ("dpo", "simpo", "cpo"):
        fail("train.label_smoothing", f"config.train.loss={config.train.loss!r} has none")
    terms = {"sft_span": ("orpo", "sft"), "gamma": ("simpo",), "sft_weight": ("cpo",), "beta": {*LOSSES} - {"sft"}}
    for name, losses in terms.items():
        if config.train[name] != OPTIONS["train"][name].default and config.train.loss not in losses:
            fail(f"train.{name}", f"config.train.loss={config.train.loss!r} has no such term")
    if config.train.held_out >= 1:
        fail("train.held_out", "must be under 1")
    for name, off in (("answer_questions", 0), ("keep", "latest")):
        if config.train[name] != off and not config.train.held_out:
            fail(f"train.{name}", "needs held-out pairs; set config.train.held_out, for example to 0.1")
    if config.train.answer_questions and config.data.pairs:
        fail("train.answer_questions", "pairs made elsewhere (config.data.pairs) have no golden answers; set it to 0")
    generate = config.generate
    if not config.select.rejection:
        if not (generate.guided_samples and generate.plain_samples):
            fail("select.rejection", "without it both config.generate.guided_samples and plain_samples are needed")
        if config.select.supported:
            fail("select.supported", "without config.select.rejection nothing is checked")
    if config.lora.dropout >= 1:
        fail("lora.dropout", "must be under 1")
    if config.train.batch % config.train.accumulate:
        fail("train.accumulate", f"must divide config.train.batch={config.train.batch}")
    elsewhere = config.generate.samples or config.data.pairs
    if config.generate.guided_samples + config.generate.plain_samples < 2 and not elsewhere:
        fail(
            "generate.plain_samples", "a pair needs at least two candidates; raise it or config.generate.guided_samples"
        )
    if unknown := set(config.lora.targets) - set(PROJECTION_NAMES):
        fail("lora.targets", f"{sorted(unknown)} unknown; known: {', '.join(PROJECTION_NAMES)}")
    if not config.lora.targets:
        fail("lora.targets", "name at least one projection")
    if set(config.evaluate.systems) - {"closed_book", "base", "adapter"}:
        fail("evaluate.systems", "a tuple of 'closed_book', 'base' and 'adapter'")
    if not (config.evaluate.systems or config.evaluate.adapters):
        fail("evaluate.systems", "name at least one system, or one of config.evaluate.adapters")
    if any(not isinstance(K, int) or K < 1 for K in config.evaluate.passages):
        fail("evaluate.passages", "a tuple of numbers from 1; 'closed_book' is a system of its own")
    if not (config.prompt.passages or config.evaluate.passages) and set(config.evaluate.noise) != {"none"}:
        fail("evaluate.noise", "config.prompt.passages=0 shows no passages; set it or config.evaluate.passages")
    for name in config.evaluate.noise or [""]:
        try:
            noise.parse(name)
        except (ValueError, TypeError) as error:
            fail("evaluate.noise", str(error))
    try:
        check_template_arguments(config.prompt.template_arguments)
    except (TypeError, ValueError) as error:
        fail("prompt.template_arguments", str(error))
    if any(not isinstance(text, str) or not text for text in config.prompt.stop):
        fail("prompt.stop", "a tuple of texts that are not empty")
    if config.retrieve.retriever == "bm25" and not config.retrieve.corpus:
        fail("retrieve.corpus", "bm25 needs a corpus: a .jsonl file or a folder")
    if config.retrieve.retriever == "cache" and not config.retrieve.cache:
        fail("retrieve.cache", "name FlashRAG's retrieval_cache.json")
    if config.retrieve.cache and config.retrieve.retriever != "cache":
        fail("retrieve.cache", "is read with config.retrieve.retriever=cache only")
    if config.retrieve.retriever != "given" and config.retrieve.k < config.prompt.passages:
        fail("retrieve.k", f"is less than config.prompt.passages={config.prompt.passages}")
    if not config.model:
        fail("model", "name a Hub id, a Hugging Face folder or a .gguf file, or --config configs/NAME.py that does")
    if workdir and not config.workdir:
        fail("workdir", "name the folder that everything goes to")


def require_files(config: ConfigDict, *names: str) -> None:
    """Check that the local files exist that the options name, and those that passages come from.

    Raises:
      UserError: one does not; said before anything expensive.
    """
    for name in (*names, "retrieve.corpus", "retrieve.cache"):
        value = get(config, name)
        if value and value != "synthetic" and "://" not in value and not Path(value).expanduser().exists():
            raise UserError(f"config.{name}={value!r}: there is no such file or folder.")
