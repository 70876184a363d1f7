"""How a run scales over devices: what is predicted, what several devices add to a step here, and which mesh fits.

    python -m benchmarks.scaling predict --model FOLDER --chip v5e --pairs 4 --plot docs/scaling.svg
    python -m benchmarks.scaling measure [--work decode] --simulate 8
    python launch/local.py --processes 4 -- benchmarks/scaling.py measure [--work decode] --simulate 2
    python -m benchmarks.scaling measure --model FOLDER --each 4 --prompt 1536 --response 192    # on real devices
    python -m benchmarks.scaling fits --models FOLDER ... --topologies v5e:2x4 ...

Of a model `config.json` is enough; weights are random. `predict` and `fits` need no devices. `measure` times the ORPO
step, or (decode) prefilling and sampling for a batch of questions, over 1, 2, 4, ... devices, with as many of them
for each (weak scaling) and with as many in all (strong), beside the prediction where the chip is known. Several
processes, each with its own devices, measure on all devices only. Simulated devices share the cores of one machine, so
it is the CPU seconds, of all processes together, that count there: what they grow by while the work stays the same is
what several devices or processes add.

The prediction of a training step is its arithmetic or its reading of the weights, whichever takes longer, and then what
it sends, not overlapped, at the chip's published rates and without latencies. Bytes sent are those that compiled
programs were seen to send: the adapter's gradients where weights are replicated; in fsdp also each layer's weights
twice and the vocabulary's once.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from roserag_jax import automatic_mesh, options
from roserag_jax.distributed import hardware, processes
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.scheduler import NumberedTask, length_classes, run_tasks
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig
from roserag_jax.models.transformer import Transformer
from roserag_jax.report.tables import markdown
from roserag_jax.training.objective import Objective
from roserag_jax.training.pair_loader import Batch
from roserag_jax.training.train_step import TrainStep, adamw

LORA = LoRAConfig(16, 32.0)
SAMPLES = 4  # of a question, in decoding
CHIPS = {chip.name.rpartition(" ")[2]: chip for chip in hardware._CHIPS.values()}
SMALL = ModelConfig("llama", 512, 256, 4, 4, 2, 64, 1024, 1e-5, 1e4)  # what `measure` runs where no model is named


def batch_of(pairs: int, prompt: int, response: int) -> Batch:
    """Random pairs without padding."""
    tokens = lambda *shape: np.random.default_rng(0).integers(3, 500, shape, dtype=np.int32)
    lengths = np.full(pairs, prompt, np.int32), np.full((pairs, 2), response, np.int32)
    branches, targets = tokens(pairs, 2, response), tokens(pairs, 2, response)
    return Batch(tokens(pairs, prompt), lengths[0], branches, targets, lengths[1], np.ones(pairs, np.float32))


def predict(config: ModelConfig, chip: hardware.Chip, *, devices: int, pairs: float, flops: float, split: bool) -> dict:
    """Predict the seconds of a training step with `pairs` pairs of `flops` FLOPs on each device."""
    weights, ring = automatic_mesh.weight_bytes(config, 2), (devices - 1) / devices
    tables = 2 * config.vocab_size * config.embed_dim
    layers = weights - tables * (1 if config.tie_embeddings else 2)
    gradients = automatic_mesh.adapter_bytes(config, LORA) / 4  # of which three quarters are the adapter and moments
    sent = 2 * ring * gradients + (ring * (2 * layers + tables) if split else 0)
    working = max(pairs * flops / chip.flops, 3 * weights / chip.bandwidth)
    return {"seconds": working + sent / chip.links, "working": working, "sending": sent / chip.links}


def predict_decoding(config: ModelConfig, chip: hardware.Chip, *, questions: float, prompt: int, new: int) -> float:
    """Predict the seconds in which a device prefills `questions` prompts and samples `new` tokens of each sample."""
    weights, token = automatic_mesh.weight_bytes(config, 2), DecoderCapacity.token_bytes(config, 2, 1)
    tables = 2 * config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    read = weights + 2 * token * questions * (prompt + SAMPLES * new / 2)
    return questions * prompt * (weights - tables) / chip.flops + new * read / chip.bandwidth


def random_model(config: ModelConfig, lora: LoRAConfig, dtype, mesh) -> Transformer:
    """A model of random weights, replicated over a mesh."""
    make = lambda: nnx.state(Transformer(config, lora, dtype, nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        state = jax.jit(make, out_shardings=jax.NamedSharding(mesh, jax.P()))()
    return nnx.merge(nnx.graphdef(loading.abstract_model(config, lora, dtype)), state)


def step_of(config: ModelConfig, devices: list, dtype, random: bool = True) -> TrainStep:
    """A training step over devices, weights replicated; of random weights, or of shapes alone."""
    mesh = make_mesh(data=len(devices), fsdp=1, tensor=1, devices=devices)
    if random:
        processes.connect(mesh)
        model = random_model(config, LORA, dtype, mesh)
    else:
        model = loading.abstract_model(config, LORA, dtype)
    return TrainStep(model, mesh, objective=Objective(remat="layer"), optimizer=adamw(1e-4, steps=1000))


def training(config: ModelConfig, devices: list, dtype, pairs: int, args) -> Callable:
    """A function that takes one training step."""
    step, batch = step_of(config, devices, dtype), batch_of(pairs, args.prompt, args.response)
    state, number = [step.init()], iter(range(1 << 30))

    def run():
        state[0], metrics = step(state[0], batch, next(number))
        jax.block_until_ready((state[0], metrics))

    return run


def decoding(config: ModelConfig, devices: list, dtype, questions: int, args) -> Callable:
    """A function that prefills prompts and samples; of several processes, each does so with its part and devices."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    mesh = make_mesh(data=len(own), fsdp=1, tensor=1, devices=own)
    engine = Engine(random_model(config, LoRAConfig(), dtype, mesh), mesh, (), 0)
    prompts = batch_of(questions // jax.process_count(), args.prompt, 1).prompt.tolist()
    capacity = DecoderCapacity(len(prompts), SAMPLES, ((1, args.response),))

    def task(i):
        yield PrefillRequest(prompts[i])
        yield DecodeRequest([prompts[i][-1:]] * SAMPLES, args.response, SamplingParams(1.0), str(i))

    def run():
        tasks = (NumberedTask(i, args.prompt, task(i)) for i in range(len(prompts)))
        for _ in run_tasks(engine, tasks, length_classes(map(len, prompts), 1), capacity):
            pass

    return run


def flops_of_pair(config: ModelConfig, prompt: int, response: int) -> float:
    """FLOPs that the mathematics of a training step takes for one pair."""
    return step_of(config, jax.devices()[:1], jnp.bfloat16, random=False).flops(batch_of(1, prompt, response))


def measure(run: Callable, repeats: int) -> tuple[float, float]:
    """Seconds of a run after one that compiles, and its CPU seconds in all processes."""
    used = lambda: (usage := resource.getrusage(resource.RUSAGE_SELF)).ru_utime + usage.ru_stime
    run()
    processes.barrier("compiled")
    start, cpu = time.monotonic(), used()
    for _ in range(repeats):
        run()
    found = processes.gather("measured", [(time.monotonic() - start) / repeats, (used() - cpu) / repeats])
    return max(seconds for seconds, _ in found), sum(cpu for _, cpu in found)


def run_measure(args) -> None:
    """The command `measure`."""
    if args.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.simulate)
    joined = options.defaults()
    joined.distributed = args.distributed
    processes.start(joined)
    config = model_files.read_config(args.model)[1] if args.model else SMALL
    available, chip = jax.devices(), hardware.chip_of(jax.devices()[0])
    on_cpu, what = available[0].platform == "cpu", {"train": "pairs", "decode": "questions"}[args.work]
    # A process without any of the devices could not take part.
    few = [n for n in (1 << i for i in range(9)) if n < len(available)] if jax.process_count() == 1 else []
    counts = [*few, len(available)]
    flops, rows, first, measured = flops_of_pair(config, args.prompt, args.response), [], {}, {}
    for n in counts:
        for scaling, units in (("weak", args.each * n), ("strong", args.each * counts[-1])):
            if (n, units) not in measured:  # on all devices both scalings are the same
                make = {"train": training, "decode": decoding}[args.work]
                run = make(config, available[:n], jnp.float32 if on_cpu else jnp.bfloat16, units, args)
                measured[n, units] = measure(run, args.repeats)
            seconds, cpu = measured[n, units]
            ratio = first.setdefault(scaling, (seconds, cpu))
            share = n if scaling == "strong" else 1
            row = {"scaling": scaling, "processes": jax.process_count(), "devices": n, what: units}
            row |= {"seconds": seconds, "cpu_seconds": cpu}
            if few:
                row["efficiency"] = ratio[0] / (seconds * share)
            if few and scaling == "strong":
                row["cpu_seconds_added"] = cpu - ratio[1]
            if chip and args.work == "train":
                predicted = predict(config, chip, devices=n, pairs=units / n, flops=flops, split=False)
                row["predicted_seconds"] = predicted["seconds"]
            elif chip:
                row["predicted_seconds"] = predict_decoding(
                    config, chip, questions=units / n, prompt=args.prompt, new=args.response
                )
            rows.append(row)
            print(json.dumps(row), flush=True)
    kind = "simulated devices" if on_cpu else available[0].device_kind
    tokens = f"{args.prompt} + {'2' if args.work == 'train' else SAMPLES} x {args.response} tokens"
    print(f"\n{args.work}: {args.model or 'a small random model'}, {tokens}, {kind}\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    print(markdown(names, [[shown(row.get(name, "")) for name in names] for row in rows]))
    processes.leave(0)


def run_predict(args) -> None:
    """The command `predict`."""
    jax.config.update("jax_platforms", "cpu")
    config, chip = model_files.read_config(args.model)[1], CHIPS[args.chip]
    flops = flops_of_pair(config, args.prompt, args.response)
    counts, curves, rows = [1 << i for i in range(9)], {}, []
    for split in (False, True):
        one = predict(config, chip, devices=1, pairs=args.pairs, flops=flops, split=False)["seconds"]
        strong = args.pairs * counts[-1]
        all_on_one = predict(config, chip, devices=1, pairs=strong, flops=flops, split=False)["seconds"]
        where = "fsdp" if split else "replicated"
        for n in counts:
            weak = predict(config, chip, devices=n, pairs=args.pairs, flops=flops, split=split)
            each = predict(config, chip, devices=n, pairs=strong / n, flops=flops, split=split)
            found = one / weak["seconds"], all_on_one / n / each["seconds"]
            for name, value in zip(("weak", "strong"), found, strict=True):
                curves.setdefault(f"{where}, {name}", []).append(value)
            times = [f"{1e3 * weak[name]:.1f}" for name in ("working", "sending")]
            rows.append([where, str(n), *times, f"{found[0]:.1%}", f"{found[1]:.1%}"])
    print(markdown(["weights", "chips", "working, ms", "sending, ms", "weak efficiency", "strong efficiency"], rows))
    if args.plot:
        draw(args, chip, counts, curves)


def draw(args, chip: hardware.Chip, counts: list[int], curves: dict[str, list[float]]) -> None:
    """Draw the predicted efficiencies as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file each time
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, values in curves.items():
        axes.plot(counts, values, "-" if "weak" in name else "--", marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set(ylim=(0, 1.05), xlabel="chips", ylabel="efficiency")
    axes.set_title(f"Predicted: ORPO step on {chip.name}, {args.pairs} pairs a chip (weak), sending not overlapped")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(args.plot, metadata={"Date": None})


def run_fits(args) -> None:
    """The command `fits`."""
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for folder in args.models:
        config = options.defaults()
        config.model, config.prompt.max_tokens = folder, args.prompt
        config.train.max_response = args.response
        model = model_files.read_config(folder)[1]
        weights = automatic_mesh.weight_bytes(model, 2)
        for name in args.topologies:
            found = hardware.topology(name)
            memory = hardware.memory_of(found[0])
            try:
                config.train.batch = max(8, len(found))
                meshes = automatic_mesh.choose_meshes(config, model, LORA, found)
            except UserError as error:
                rows.append([folder.rstrip("/").rpartition("/")[2], name, str(error), "", "", ""])
                continue
            capacity = automatic_mesh.decoder_capacity(config, meshes.decoding.size)
            slot = capacity.slot_bytes(model, 2, args.prompt, meshes.decoding.shape["tensor"])
            pairs = automatic_mesh.most_pairs(
                model,
                LORA,
                2,
                meshes.training,
                memory=memory,
                tokens=args.prompt + 2 * args.response,
                remat="layer",
            )
            shape = lambda mesh: " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one"
            questions = automatic_mesh.most_questions(weights, meshes.decoding, memory, slot)
            label = folder.rstrip("/").rpartition("/")[2]
            rows.append([label, name, shape(meshes.decoding), str(questions), shape(meshes.training), str(pairs)])
    print(markdown(["model", "topology", "decoding mesh of a host", "questions", "training mesh", "pairs"], rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (run_predict, run_measure, run_fits):
        command = commands.add_parser(run.__name__.removeprefix("run_"))
        command.set_defaults(run=run)
        small = run is run_measure
        command.add_argument("--prompt", type=int, default=256 if small else 1536, help="tokens of a prompt")
        command.add_argument("--response", type=int, default=32 if small else 192, help="tokens of a response")
        if run is run_fits:
            command.add_argument("--models", nargs="+", required=True, help="folders with config.json")
            command.add_argument("--topologies", nargs="+", required=True, help="as libtpu names them, v5e:2x4")
            continue
        command.add_argument("--model", required=not small, help="folder with config.json")
        if small:
            command.add_argument("--work", choices=("train", "decode"), default="train", help="what is timed")
            command.add_argument("--each", type=int, default=1, help="pairs or questions of a device in weak scaling")
            command.add_argument("--simulate", type=int, default=0, help="number of devices to simulate on the CPU")
            command.add_argument("--repeats", type=int, default=3, help="steps or batches that are timed")
            command.add_argument(
                "--config.distributed", dest="distributed", default="", help="as in every command of roserag_jax"
            )
        else:
            command.add_argument("--pairs", type=int, default=4, help="pairs of a device in weak scaling")
            command.add_argument("--chip", choices=CHIPS, default="v5e", help="chip to predict for")
            command.add_argument("--plot", help="SVG file to draw the efficiencies in")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
