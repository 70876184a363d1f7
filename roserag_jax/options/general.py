"""Options of the run as a whole: the model, the workdir, the devices and the processes."""

from roserag_jax.options.option import Faults, Option, together

GENERAL = {
    "model": Option("", "base model: a Hub id, a local Hugging Face folder or a .gguf file"),
    "revision": Option("", "branch, tag or commit of the model's Hub id; empty is the default branch"),
    "tokenizer": Option("", "Hub id or folder of the tokenizer; empty uses the model's own"),
    "dtype": Option(
        "bfloat16",
        "type of the frozen weights and activations; the adapter and sums are float32",
        ("float32", "bfloat16"),
    ),
    "base_dtype": Option(
        "",
        "type that the frozen weights of the layers are kept in, in every stage; int8 rounds them (half of bfloat16's "
        "memory, for models that would not fit), empty is dtype",
        ("", "int8"),
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


@together
def _a_merged_adapter_needs_its_digits(config) -> Faults:
    if config.merge and config.base_dtype:
        yield (
            "merge",
            f"an adapter merged into weights of config.base_dtype={config.base_dtype} is rounded away; set False",
        )
