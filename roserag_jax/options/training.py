"""Options of training: the adapter, the loss, the optimizer, evaluation on held-out pairs, and checkpoints."""

from roserag_jax.models.lora import PROJECTIONS
from roserag_jax.options.option import Faults, Option, together
from roserag_jax.preference.labels import LABELS
from roserag_jax.training import losses


def _projections(value) -> str | None:
    if unknown := set(value) - set(PROJECTIONS):
        return f"{sorted(unknown)} unknown; known: {', '.join(PROJECTIONS)}"
    return None if value else "name at least one projection"


LORA = {
    "rank": Option(16, "rank of the LoRA adapter", at_least=1),
    "alpha": Option(32.0, "scale of the LoRA adapter: its product is multiplied by alpha / rank", above=0),
    "dropout": Option(0.0, "dropout probability on the adapter's input while training", at_least=0, below=1),
    "rslora": Option(False, "scale the adapter by alpha / sqrt(rank) instead (rsLoRA)"),
    "targets": Option(PROJECTIONS, "projections that get an adapter", check=_projections),
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
    "rounds": Option(
        1,
        "rounds of generate, select and train; from the second on the adapter of the round before samples the "
        "candidates and is trained on (epochs and learning rate are each round's)",
        at_least=1,
    ),
    "epochs": Option(2, "number of passes over the pairs", at_least=1),
    "batch": Option(
        8, "pairs per step; the mesh.data x mesh.fsdp devices take equal shares of each microbatch", at_least=1
    ),
    "accumulate": Option(
        1,
        "gradient-accumulation steps: microbatches that a step's batch is split into; the same result without dropout "
        "(but for its last digits); 0 is as few as should fit in the devices' memory beside the weights (on a CPU 1)",
        at_least=0,
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
def _rounds_sample_anew(config) -> Faults:
    if config.train.rounds > 1 and config.data.pairs:
        yield "train.rounds", "pairs made elsewhere (config.data.pairs) are those of one round; set it to 1"
    if config.train.rounds > 1 and config.select.labels == "scores":
        yield "train.rounds", "config.select.labels=scores has the scores of one round's candidates; set it to 1"


@together
def _held_out_pairs_exist(config) -> Faults:
    for name, off in (("answer_questions", 0), ("keep", "latest")):
        if config.train[name] != off and not config.train.held_out:
            yield f"train.{name}", "needs held-out pairs; set config.train.held_out, for example to 0.1"
    if config.train.answer_questions and not LABELS[config.select.labels].hint:
        yield "train.answer_questions", f"config.select.labels={config.select.labels} knows no answers; set it to 0"
    if config.train.answer_questions and config.data.pairs:
        why = "pairs made elsewhere (config.data.pairs) have no golden answers; set it to 0"
        yield "train.answer_questions", why


@together
def _microbatches_are_equal(config) -> Faults:
    if config.train.accumulate and config.train.batch % config.train.accumulate:
        yield "train.accumulate", f"must divide config.train.batch={config.train.batch}"
