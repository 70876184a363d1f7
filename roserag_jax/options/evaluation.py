"""Options of evaluation and export."""

from roserag_jax.options.option import Faults, Option, together
from roserag_jax.rag import noise
from roserag_jax.rag.answers import METRICS
from roserag_jax.rag.metrics import SIMILARITY


def _systems(value) -> str | None:
    good = not set(value) - {"closed_book", "base", "adapter"}
    return None if good else "a tuple of 'closed_book', 'base' and 'adapter'"


def _folders(value) -> str | None:
    good = all(isinstance(folder, str) and folder for folder in value)
    return None if good else "a tuple of names of folders"


def _numbers_of_passages(value) -> str | None:
    good = all(isinstance(K, int) and K >= 1 for K in value)
    return None if good else "a tuple of numbers from 1; 'closed_book' is a system of its own"


def _similarity(value) -> str | None:
    good = set(value) <= {*SIMILARITY} and len(set(value)) == len(value)
    return None if good else f"a tuple of {', '.join(map(repr, SIMILARITY))}, each once"


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
        (),
        "PEFT folders to compare as well; each is called by its name, or its parent's if it is 'adapter'",
        check=_folders,
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
    "similarity": Option(
        (),
        "measures of how similar an answer is to the golden ones, beside exact match and F1; for texts such as "
        "summaries: "
        + ", ".join(f"{title} ({name})" for name, title in SIMILARITY.items())
        + "; a change of it does not answer the questions again",
        check=_similarity,
    ),
    "encoder": Option(
        "", "for similarity=bert_score: Hub id or folder of an encoder of the BERT family, also of a sentence encoder"
    ),
    "max_tokens": Option(160, "most tokens of a response", at_least=1),
    "batch": Option(
        0,
        "questions decoded at a time by a process; 0 is as many as its devices' memory holds, at most 64 on each (on a "
        "CPU 16)",
        at_least=0,
    ),
}


@together
def _metric_is_defined_for_the_language(config) -> Faults:
    languages = METRICS[config.evaluate.metric].languages
    if languages and config.data.language not in languages:
        yield "data.language", f"config.evaluate.metric={config.evaluate.metric} needs one of {', '.join(languages)}"
    if config.data.language and not languages:
        yield "data.language", f"config.evaluate.metric={config.evaluate.metric} has no languages; use mlqa or mkqa"


@together
def _similarity_by_an_encoder_names_it(config) -> Faults:
    wanted = "bert_score" in config.evaluate.similarity
    if wanted and not config.evaluate.encoder:
        yield "evaluate.encoder", "config.evaluate.similarity has bert_score, which needs an encoder; name one"
    if config.evaluate.encoder and not wanted:
        yield "evaluate.encoder", "takes effect with 'bert_score' in config.evaluate.similarity only"


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
