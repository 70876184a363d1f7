"""Options of what makes the pairs: the prompt, the sampled rationales, and the selection among them."""

import collections

from roserag_jax.options.option import Faults, Option, together
from roserag_jax.preference.labels import LABELS, VOTE
from roserag_jax.preference.selection import STRATEGIES
from roserag_jax.rag.chat import TEMPLATE_ARGUMENTS, check_template_arguments


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
    "answer_line": Option(
        True,
        "ask for a short answer on a line of its own; False is for texts that no short answer stands for, such as "
        "summaries: the complete response is the answer then (select.labels=reward or scores)",
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
        0,
        "questions decoded at a time by a process, rounded up to its devices; a new one starts when one is finished; 0 "
        "is as many as the devices' memory holds, at most 64 on each (on a CPU 8)",
        at_least=0,
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
    "labels": Option(
        "gold",
        "what says which candidates are right: "
        + ", ".join(f"{source.help} ({name})" for name, source in LABELS.items()),
        (*LABELS,),
    ),
    "agreement": Option(
        0.5,
        "for labels=self_consistency: fraction of a question's plain samples that must give an answer for it to take "
        "the golden answer's place",
        above=0,
        at_most=1,
    ),
    "reward_model": Option(
        "",
        "for labels=reward: Hub id or folder of a sequence classifier of one label (reward model) of a known family",
    ),
    "scores": Option(
        "", "for labels=scores: a .jsonl of {id, candidate, score}, the candidate being a response in candidates.jsonl"
    ),
    "reward_threshold": Option(
        0.0, "for labels=reward and scores: candidates of at least this reward may be chosen, others rejected"
    ),
    "reward_margin": Option(
        0.0,
        "for labels=reward and scores: leave out candidates whose reward is nearer to the threshold than this",
        at_least=0,
    ),
    "reward_relative": Option(
        False,
        "for labels=reward and scores: take rewards relative to the mean of the question's candidates, as models "
        "trained on comparisons need it",
    ),
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
def _labels_have_their_options(config) -> Faults:
    select, source = config.select, LABELS[config.select.labels]
    for name in source.needs:
        if not select[name]:
            yield f"select.{name}", f"config.select.labels={select.labels} needs it"
    users = collections.defaultdict(list)
    for name, other in LABELS.items():
        for option in (*other.needs, *other.only):
            users[option].append(name)
    for option, names in users.items():
        if select.labels not in names and select[option] != SELECT[option].default:
            yield f"select.{option}", f"takes effect with config.select.labels={' or '.join(names)} only"


@together
def _guided_samples_have_a_hint(config) -> Faults:
    generate, labels = config.generate, config.select.labels
    if config.data.pairs:
        return
    if LABELS[labels].hint == VOTE and generate.plain_samples < 2 and not generate.samples:
        yield "generate.plain_samples", f"config.select.labels={labels} lets them vote; set 2 or more"
    if not LABELS[labels].hint:
        if generate.guided_samples:
            yield "generate.guided_samples", f"config.select.labels={labels} has no answer to guide by; set it to 0"
        if config.select.supported:
            yield "select.supported", f"config.select.labels={labels} knows no answers"


@together
def _selection_without_rejection(config) -> Faults:
    if config.select.rejection:
        return
    if not (config.generate.guided_samples and config.generate.plain_samples):
        yield "select.rejection", "without it both config.generate.guided_samples and plain_samples are needed"
    if config.select.supported:
        yield "select.supported", "without config.select.rejection nothing is checked"
