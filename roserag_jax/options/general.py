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


def _mesh_axis(value) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value == -1)
    return None if whole or value == "auto" else "'auto', a number of devices, or -1 for all that remain"


MESH = {
    "data": Option(
        "auto",
        "number of devices over which batches are split and weights are replicated; where all three are 'auto', the "
        "mesh follows from the model's size and the devices' memory, one for decoding and one for training; beside a "
        "number, the first 'auto' takes the devices that remain",
        check=_mesh_axis,
        value_type=object,
    ),
    "fsdp": Option(
        "auto",
        "number of devices over which batches and weights are split: for weights that do not fit on one",
        check=_mesh_axis,
        value_type=object,
    ),
    "tensor": Option(
        "auto",
        "number of devices over which heads, MLP and vocabulary are split",
        check=_mesh_axis,
        value_type=object,
    ),
    "memory_gb": Option(
        0.0,
        "memory of a device that the automatic mesh counts on; 0.0 is what the device has (that of a CPU is not known: "
        "weights are then replicated)",
        at_least=0,
    ),
}


@together
def _a_merged_adapter_needs_its_digits(config) -> Faults:
    if config.merge and config.base_dtype:
        yield (
            "merge",
            f"an adapter merged into weights of config.base_dtype={config.base_dtype} is rounded away; set False",
        )
