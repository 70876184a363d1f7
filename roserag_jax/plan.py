"""Compile a run's programs for other hardware, and print the memory and time that they take there.

    python -m roserag_jax.plan --config configs/gemma2b.py --topology v5e:2x4 [--slices 2] [--largest]
    python -m roserag_jax.plan --config configs/gemma2b.py --topology gpu:h100x8

Needs the extra `plan` (libtpu), or for GPUs the CUDA plug-in, and minutes, but no accelerator and no weights: of the
model only `config.json` is read, so `config.model` may be a folder with that file alone. Prints the meshes that the run
would have on these devices (`config.mesh`, by default chosen from the sizes), how many questions and pairs should fit
on them, and for the prefill of prompts, a decode step, scoring and a training step: memory per device and whether it
fits, collectives, FLOPs and bytes, the roofline time and what bounds it, and how long it took to compile. With
`--largest` the most questions and pairs that fit are found by compiling, in some three to five programs each.

Shapes are the largest of the configuration: prompts of `prompt.max_tokens`, responses of `train.max_response`. The
roofline takes the chip's published rates and no latencies; a real step takes longer. Several processes decode each by
itself, so decoding is planned for the devices of one host.
"""

import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roserag_jax import automatic_mesh, cli
from roserag_jax.distributed import hardware
from roserag_jax.distributed.collectives import count_collectives
from roserag_jax.distributed.hardware import Chip
from roserag_jax.distributed.mesh import prefers_unstacked_layers
from roserag_jax.distributed.sharding import devices, sharding, state_shardings
from roserag_jax.errors import UserError, first_line
from roserag_jax.hub import loading, model_files
from roserag_jax.inference import decode_step, engine, kv_cache
from roserag_jax.inference.decode_step import DecodeState, RequestParams
from roserag_jax.inference.engine import bucket
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.models.cache import PrefixCache, SuffixCache
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig
from roserag_jax.training.objective import Objective
from roserag_jax.training.pair_loader import Batch
from roserag_jax.training.train_step import TrainStep, adamw

_ARGUMENTS = flags.FlagValues()  # of this command alone
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "devices to compile for, as in v5e:2x4, v5p:2x2x2 or gpu:h100x8", flag_values=_ARGUMENTS
)
_SLICES = flags.DEFINE_integer("slices", 1, "how many slices (of GPUs, machines) of them", flag_values=_ARGUMENTS)
_LARGEST = flags.DEFINE_boolean(
    "largest", False, "find by compiling how many questions and pairs fit", flag_values=_ARGUMENTS
)
_PROGRAMS = flags.DEFINE_list(
    "programs", ["prefill", "decode", "score", "train"], "which to compile", flag_values=_ARGUMENTS
)
_ROWS = flags.DEFINE_string(
    "rows", None, "JSON lines file to which what was found of each program is appended", flag_values=_ARGUMENTS
)
SCORED = 8  # responses of a prompt that are scored together


class Program(NamedTuple):
    """A program of a run: how to lower it, and what its mathematics takes on all devices together."""

    name: str
    work: str
    mesh: Mesh
    lower: Callable
    flops: float
    bytes: float


class Plan:
    """A configuration's programs for some devices, made of shapes alone."""

    def __init__(self, config, found: list):
        self.config, self.devices = config, found
        _, self.model_config = model_files.read_config(config.model, config.revision or None)
        self.dtype, self.quantized = jnp.dtype(config.dtype), bool(config.base_dtype)
        self.lora = LoRAConfig(
            config.lora.rank,
            config.lora.alpha,
            config.lora.dropout,
            tuple(t for t in PROJECTIONS if t in config.lora.targets),
            config.lora.rslora,
        )
        self.weights = automatic_mesh.weight_bytes(self.model_config, self.dtype.itemsize, self.quantized)
        self.meshes = automatic_mesh.choose_meshes(config, self.model_config, self.lora, found)
        self.capacity = automatic_mesh.decoder_capacity(config, self.meshes.decoding.size)
        self.prompt_length = config.prompt.max_tokens

    def limits(self, memory: float) -> str:
        """Describe how many questions and pairs the memory of a device should hold, estimated."""
        questions, pairs = (self._estimate(name, memory)[0] for name in ("decode", "train"))
        return (
            f"estimated to fit: {questions} questions x {self.capacity.branches} samples at a time "
            f"(generate.batch), {pairs} pairs in a microbatch (train.batch / train.accumulate)"
        )

    def _estimate(self, name: str, memory: float) -> tuple[int, float]:
        """How many questions ('decode') or pairs ('train') should fit, and the bytes of one more on a device."""
        c, itemsize, train = self.model_config, self.dtype.itemsize, self.config.train
        if name == "decode":
            mesh = self.meshes.decoding
            slot = self.capacity.slot_bytes(c, itemsize, self.prompt_length, mesh.shape["tensor"])
            return automatic_mesh.most_questions(self.weights, mesh, memory, slot), slot
        sizes = {"tokens": self.prompt_length + 2 * train.max_response, "remat": train.remat}
        network = c, self.lora, itemsize
        pairs = automatic_mesh.most_pairs(
            *network, self.meshes.training, memory=memory, quantized=self.quantized, **sizes
        )
        one, two = (automatic_mesh.training_needs(*network, pairs=n, **sizes) for n in (100, 101))
        return pairs, two - one

    def largest(self, name: str, chip: Chip, memory: float) -> str:
        """Find by compiling the most questions ('decode') or pairs of a microbatch ('train') that fit."""
        mesh = self.meshes.decoding if name == "decode" else self.meshes.training
        make = self._decode if name == "decode" else self._train
        X, (count, each) = devices("batch", mesh), self._estimate(name, memory)
        tried, totals, count = {}, {}, max(1, count // X)  # of each device: does it fit, and the bytes that it takes
        while count > 0 and count not in tried:
            row = measure(make(mesh, count * X), chip, memory)
            tried[count], used = row["fits"], row.get("refused")
            if "total" in row:
                totals[count], used = row["total"], _size(row["total"])
            print(f"{row['work']}: {'fits' if row['fits'] else 'does not fit'}, {used}", flush=True)
            low = max((n for n, fits in tried.items() if fits), default=0)
            high = min((n for n, fits in tried.items() if not fits), default=None)
            spare = _spare(count, totals, memory, each) if count in totals else -1 - count // 16
            if high is None:
                count += max(1, spare)
            elif low == 0:
                count = max(1, count + min(-1, spare))
            elif high - low > max(1, low // 20):
                count = low + max(1, min(spare, high - low - 1)) if row["fits"] else (low + high) // 2
        low, high = low * X, high * X if high else None
        what = f"questions x {self.capacity.branches} samples" if name == "decode" else "pairs in a microbatch"
        return f"fit by compiling: {low} {what}" + (f", and not {high}" if high else "")

    def programs(self) -> list[Program]:
        """The programs that were asked for."""
        decoding, training, _ = self.meshes
        made = {
            "prefill": lambda: self._prefill(decoding),
            "decode": lambda: self._decode(decoding),
            "score": lambda: self._score(decoding),
            "train": lambda: self._train(training),
        }
        return [made[name]() for name in _PROGRAMS.value]

    def _network(self, mesh):
        """The frozen network's structure and the shapes of its weights, laid over a mesh."""
        network, weights = engine.split(
            loading.abstract_model(self.model_config, LoRAConfig(), self.dtype, self.quantized)
        )
        places = jax.tree.leaves(state_shardings(network.state(weights), mesh))
        shape = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return network, tuple(map(shape, weights, places))

    def _array(self, mesh, shape, dtype, axes=("batch",)):
        axes = tuple(axes) + (None,) * (len(shape) - len(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(shape, axes, mesh))

    def _forward(self, tokens: float, keys: float) -> float:
        """FLOPs of `tokens` tokens that attend to `keys` keys each, the vocabulary aside."""
        c = self.model_config
        tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
        attention = 4 * keys * c.num_layers * c.num_heads * c.head_dim
        return tokens * (2 * (automatic_mesh.weight_bytes(c, 1) - tables) + attention)

    def _cache_read(self, mesh, tokens: float) -> float:
        """Bytes that all devices read of the keys and values of `tokens` tokens, each device all that it holds."""
        tensor = devices("heads", mesh)
        return 2 * tokens * tensor * self.capacity.token_bytes(self.model_config, self.dtype.itemsize, tensor)

    def _prompts(self, mesh, count: int) -> PrefixCache:
        shapes = kv_cache.prefix_shapes(self.model_config, count, bucket(self.prompt_length), mesh)
        return PrefixCache(*self._stacked(mesh, shapes, kv_cache.PREFIX_AXES), self._array(mesh, (count,), np.int32))

    def _stacked(self, mesh, shapes, axes) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Caches of all layers, from the shapes of one layer's."""
        L = self.model_config.num_layers
        return tuple(self._array(mesh, (L, *shape), self.dtype, (None, *axes)) for shape in shapes)

    def _prefill(self, mesh) -> Program:
        X, P = devices("batch", mesh), bucket(self.prompt_length)
        network, weights = self._network(mesh)
        tokens, lengths = self._array(mesh, (X, P), np.int32), self._array(mesh, (X,), np.int32)
        lower = lambda: engine._prefill.lower(network, weights, tokens, lengths, None)
        work = f"{X} prompts of {P} tokens"
        return Program("prefill", work, mesh, lower, self._forward(X * P, P / 2), self._weights_read(mesh))

    def _weights_read(self, mesh) -> float:
        """Bytes of weights that all devices read: once by each group that has all of them."""
        return self.weights * devices("batch", mesh)

    def _decode(self, mesh, questions: int | None = None) -> Program:
        c, capacity, X = self.model_config, self.capacity, devices("batch", mesh)
        B, N = -(-(questions or capacity.slots) // X) * X, capacity.branches
        S, M = capacity.max_new_tokens, capacity.suffix_length
        network, weights = self._network(mesh)
        prompts, layers = self._prompts(mesh, B), None
        array = lambda *shape, dtype=np.int32: self._array(mesh, shape, dtype)
        suffix_shapes = kv_cache.suffix_shapes(c, B, N, M, mesh)
        caches = (prompts.k, prompts.v), self._stacked(mesh, suffix_shapes, kv_cache.SUFFIX_AXES)
        if prefers_unstacked_layers(mesh):
            caches = tuple(tuple((_of_layer(array),) * c.num_layers for array in cache) for cache in caches)
            layers = (tuple(map(_of_layer, jax.tree.leaves(network.state(weights)["layers"]))),) * c.num_layers
        prefix, suffix = caches
        state = DecodeState(
            cache=SuffixCache(
                *suffix,
                array(B, N, M),
                array(B, N, M, dtype=bool),
                jax.ShapeDtypeStruct((), np.int32),
            ),
            last_token=array(B, N),
            tokens=array(B, N, S),
            logprobs=array(B, N, S, dtype=np.float32),
            num_tokens=array(B, N),
            active=array(B, N, dtype=bool),
            stopped=array(B, N, dtype=bool),
        )
        rate = lambda: array(B, dtype=np.float32)
        params = RequestParams(
            prompt_length=array(B),
            max_new_tokens=array(B),
            sampling=SamplingParams(rate(), rate(), array(B), rate()),
            question_seed=array(B, dtype=np.uint32),
            first_sample=array(B, dtype=np.uint32),
            use_extra_stop_ids=array(B),
        )
        stop_mask = jax.ShapeDtypeStruct((2, c.vocab_size), bool)
        key = jax.eval_shape(lambda: jax.random.key(0))
        lower = lambda: decode_step.decode_chunk.lower(network, weights, layers, prefix, state, params, stop_mask, key)
        flops = self._forward(B * N, self.prompt_length + M / 2) + 2 * B * N * c.vocab_size * c.embed_dim
        read = self._weights_read(mesh) + self._cache_read(mesh, B * (self.prompt_length + N * M / 2))
        return Program("decode step", f"{B} questions x {N} samples", mesh, lower, flops, read)

    def _score(self, mesh) -> Program:
        X, S = devices("batch", mesh), bucket(self.config.generate.max_tokens)
        network, weights = self._network(mesh)
        cache = self._prompts(mesh, X)
        tokens = self._array(mesh, (X, SCORED, S), np.int32)
        lower = lambda: engine._score.lower(network, weights, cache, tokens, tokens)
        flops = self._forward(X * SCORED * S, self.prompt_length + S / 2)
        flops += 2 * X * SCORED * S * self.model_config.vocab_size * self.model_config.embed_dim
        work = f"{X} prompts x {SCORED} responses of {S}"
        return Program("scoring", work, mesh, lower, flops, self._weights_read(mesh))

    def _train(self, mesh, pairs: int | None = None) -> Program:
        train, c = self.config.train, self.model_config
        accumulate = automatic_mesh.accumulation(self.config, c, self.lora, mesh)
        model = loading.abstract_model(c, self.lora, self.dtype, self.quantized)
        step = TrainStep(
            model,
            mesh,
            objective=Objective.from_options(train, dropout=self.lora.dropout > 0),
            optimizer=adamw(train.learning_rate, steps=1000, warmup=train.warmup),
            accumulate=accumulate,
        )
        B = pairs * accumulate if pairs else train.batch
        P, S = bucket(self.prompt_length), bucket(train.max_response)
        batch = Batch(
            prompt=np.zeros((B, P), np.int32),
            prompt_lengths=np.full(B, P, np.int32),
            branches=np.zeros((B, 2, S), np.int32),
            targets=np.zeros((B, 2, S), np.int32),
            response_lengths=np.full((B, 2), S, np.int32),
            weights=np.ones(B, np.float32),
        )
        passes = 3 * accumulate  # forward, its recomputation, backward
        read = passes * self._weights_read(mesh)
        work = f"{B} pairs of {P} + 2 x {S} tokens"
        return Program("training step", work, mesh, lambda: step.lower(batch), step.flops(batch), read)


def _spare(count: int, totals: dict[int, int], memory: float, each: float) -> int:
    """How many more than `count` should fit, at most as many again; negative where fewer should.

    Args:
      totals: bytes of the counts that were compiled.
      each: bytes of one more, before two counts have shown it.
    """
    if len(totals) > 1:
        (few, less), (most, more) = min(totals.items()), max(totals.items())
        each = max(1, (more - less) / (most - few))
    return min(int((memory - totals[count]) / each), count)


def _of_layer(stacked: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of one layer of an array that is stacked over layers."""
    mesh, (_, *spec) = stacked.sharding.mesh, stacked.sharding.spec
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=where)


def measure(program: Program, chip: Chip, memory: float) -> dict:
    """Compile a program and return what it takes, by name; times in seconds, sizes in bytes, of one device.

    Args:
      memory: bytes that it may take. The compiler refuses what does not fit on a TPU.
    """
    n, start, cpu = program.mesh.size, time.monotonic(), time.process_time()
    row = {"program": program.name, "work": program.work, "mesh": dict(program.mesh.shape), "chip": chip.name}
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
            raise
        return row | {"refused": first_line(error)[:300], "fits": False}
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    found = compiled.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    total = found.argument_size_in_bytes + found.temp_size_in_bytes + results
    traffic = count_collectives(compiled.as_text())
    wire = sum(kind.bytes for kind in traffic.values())
    return row | {
        "arguments": found.argument_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "results": results,
        "total": total,
        "fits": total <= memory,
        "collectives": {kind: tuple(each) for kind, each in sorted(traffic.items())},
        "flops": program.flops / n,
        "read": program.bytes / n,
        "sent": wire,
        "times": {
            "arithmetic": program.flops / n / chip.flops,
            "memory": program.bytes / n / chip.bandwidth,
            "wire": wire / chip.links,
        },
        "compile_seconds": seconds,
        "compile_cpu_seconds": cpu_seconds,
        "code": found.generated_code_size_in_bytes,
    }


def describe(row: dict, memory: float) -> str:
    """Describe what `measure` found in a few lines."""
    title = f"{row['program']} ({row['work']})"
    if "refused" in row:
        return f"{title}: DOES NOT FIT. {row['refused']}"
    times, fits = row["times"], "fits" if row["fits"] else "DOES NOT FIT"
    bound = max(times, key=times.get)
    sent = ", ".join(f"{kind} {count} x, {_size(size)}" for kind, (count, size) in row["collectives"].items())
    lines = [
        title,
        f"memory per device  {_size(row['total'])} of {_size(memory)} ({fits}): arguments "
        f"{_size(row['arguments'])}, temporary {_size(row['temporary'])}, results {_size(row['results'])}",
        f"collectives        {sent or 'none'}",
        f"per device         {row['flops'] / 1e9:.4g} GFLOPs, at least {_size(row['read'])} read, "
        f"{_size(row['sent'])} sent",
        f"roofline           {1e3 * times[bound]:.3g} ms, bound by {bound} "
        f"({', '.join(f'{kind} {1e3 * t:.3g}' for kind, t in times.items())})",
        f"compiled in        {row['compile_seconds']:.0f} s ({row['compile_cpu_seconds']:.0f} of a CPU) to "
        f"{_size(row['code'])}",
    ]
    return "\n  ".join(lines)


def _size(count: float) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def run(config) -> None:
    """The command."""
    if not _TOPOLOGY.value:
        raise UserError("--topology is needed, as in --topology=v5e:2x4.")
    if unknown := set(_PROGRAMS.value) - {"prefill", "decode", "score", "train"}:
        raise UserError(f"--programs: {sorted(unknown)} unknown; known: prefill, decode, score, train.")
    if _ROWS.value and not os.path.isdir(os.path.dirname(_ROWS.value) or "."):
        raise UserError(f"--rows={_ROWS.value}: there is no folder {os.path.dirname(_ROWS.value)}.")
    jax.config.update("jax_platforms", "cpu")  # a chip that is there is not needed
    jax.config.update("jax_enable_compilation_cache", False)  # its time is part of the answer
    found = hardware.topology(_TOPOLOGY.value, _SLICES.value)
    chip = hardware.chip_of(found[0])
    if chip is None:
        raise UserError(f"--topology={_TOPOLOGY.value}: the rates of a {found[0].device_kind!r} are not known.")
    plan = Plan(config, found)
    print(f"{config.model} in {config.dtype} on {len(found)} x {chip.name}: weights {plan.weights / 1e9:.2f} GB")
    memory = config.mesh.memory_gb * 1e9 or chip.memory
    print(f"{plan.meshes.why}\n{plan.limits(memory)}", flush=True)
    if _LARGEST.value:
        for name in [name for name in ("decode", "train") if name in _PROGRAMS.value]:
            print(plan.largest(name, chip, memory), flush=True)
        return
    for program in plan.programs():
        row = measure(program, chip, memory)
        print(describe(row, memory), flush=True)
        if _ROWS.value:
            with open(_ROWS.value, "a", encoding="utf-8") as file:
                about = {"model": config.model, "topology": _TOPOLOGY.value, "slices": _SLICES.value}
                file.write(json.dumps(about | row) + "\n")


if __name__ == "__main__":
    cli.main(run, __doc__, _ARGUMENTS, workdir=False, alone=True, resumes=False)
