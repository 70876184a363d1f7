"""The mesh that suits a model and its devices.

Where weights, caches and activations fit on one device, weights are replicated: nothing but the adapter's gradients
then goes over the wire. Else decoding splits heads, MLP and vocabulary (tensor) over as few devices as it takes, so
that no weights are gathered for each token, and training splits the weights (fsdp), whose gathering a step's
arithmetic hides. Both meshes are of the same devices, except that each of several processes decodes by itself.

The sizes are estimates from the shapes; `roserag plan` compiles the programs and says what they really take.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from roserag_jax.distributed import hardware, sharding
from roserag_jax.distributed.mesh import AXES, make_mesh, prefers_unstacked_layers
from roserag_jax.inference.requests import DecoderCapacity
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig

SLOTS = 8  # questions decoded at a time on a device, where `generate.batch` leaves it to the memory
_HEADROOM = 0.92  # of a device's memory; the rest is for what the estimates leave out


class Choice(NamedTuple):
    """Sizes of the mesh's axes, and why."""

    sizes: dict[str, int]
    why: str


class Meshes(NamedTuple):
    """The mesh to decode with and the one to train with, and in one line why they are so."""

    decoding: Mesh
    training: Mesh
    why: str


def choose_meshes(config: ConfigDict, model: ModelConfig, lora: LoRAConfig, devices: Sequence[Any]) -> Meshes:
    """Make the meshes of a run: those that `config.mesh` says, or where all of it is 'auto' those that suit.

    Args:
      devices: of all processes; they need not be there.

    Raises:
      UserError: `config.mesh` does not make so many devices.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    sizes = {axis: config.mesh[axis] for axis in AXES}
    if set(sizes.values()) != {"auto"}:
        training = decoding = _filled(sizes)
        if len(local) < len(devices):  # a process that decodes has its own devices only, split like those of training
            training = dict(make_mesh(**training, devices=devices).shape)
            data, fsdp = (-1, 1) if training["fsdp"] == 1 else (1, -1)
            decoding = {"data": data, "fsdp": fsdp, "tensor": training["tensor"]}
        why = "as config.mesh says"
    else:
        memory = config.mesh.memory_gb * 1e9 or hardware.memory_of(devices[0])
        train = _for_training(config, model, lora, len(devices), memory)
        decode = _for_decoding(config, model, local, memory)
        training, decoding = train.sizes, decode.sizes
        why = f"training {train.why}; decoding {decode.why}"
    meshes = make_mesh(**decoding, devices=local), make_mesh(**training, devices=devices)
    shown = (" ".join(f"{axis}={size}" for axis, size in mesh.shape.items()) for mesh in meshes)
    return Meshes(*meshes, "mesh for decoding {}, for training {}: {}".format(*shown, why))


def _filled(sizes: dict[str, int | str]) -> dict[str, int]:
    """Sizes with numbers for 'auto': the first of them takes what remains, unless another does, the others are 1."""
    free = [axis for axis, size in sizes.items() if size == "auto"]
    filling = free[0] if free and -1 not in sizes.values() else None
    return {axis: (-1 if axis == filling else 1) if axis in free else size for axis, size in sizes.items()}


def decoder_capacity(config: ConfigDict, devices: int) -> DecoderCapacity:
    """What the decoder has to hold for `generate`, before the questions are known."""
    generate = config.generate
    return DecoderCapacity(
        generate.batch or SLOTS * devices,
        max(generate.guided_samples, generate.plain_samples, 1),
        ((1, generate.max_tokens), (generate.max_tokens + 8, generate.answer_tokens)),
    )


def _for_training(config, model, lora, devices: int, memory: float | None) -> Choice:
    train = config.train
    return for_training(
        model,
        lora,
        jnp.dtype(config.dtype).itemsize,
        devices=devices,
        memory=memory,
        pairs=train.batch // (train.accumulate or train.batch),
        tokens=config.prompt.max_tokens + 2 * train.max_response,
        remat=train.remat,
        quantized=bool(config.base_dtype),
    )


def _for_decoding(config, model, local: Sequence[Any], memory: float | None) -> Choice:
    capacity, itemsize = decoder_capacity(config, len(local)), jnp.dtype(config.dtype).itemsize
    replicated = make_mesh(data=len(local), fsdp=1, tensor=1, devices=local)
    return for_decoding(
        model,
        itemsize,
        devices=len(local),
        memory=memory,
        slots=capacity.slots,
        slot_bytes=functools.partial(capacity.slot_bytes, model, itemsize, config.prompt.max_tokens),
        copies=2 if prefers_unstacked_layers(replicated) else 1,
        quantized=bool(config.base_dtype),
    )


def weight_bytes(config: ModelConfig, itemsize: int, quantized: bool = False) -> int:
    """Bytes of the frozen weights, those of projections one each if they are quantized."""
    c = config
    heads = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
    projections = c.num_layers * (heads + 3 * c.embed_dim * c.mlp_dim)
    return (1 if quantized else itemsize) * projections + itemsize * tables


def adapter_bytes(config: ModelConfig, lora: LoRAConfig) -> int:
    """Bytes of the adapter, its gradient and AdamW's two moments, all in float32."""
    c, widths = config, {}
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    widths |= {"q_proj": c.embed_dim + q, "k_proj": c.embed_dim + kv, "v_proj": c.embed_dim + kv}
    widths |= {"o_proj": q + c.embed_dim}
    widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), c.embed_dim + c.mlp_dim)
    return 16 * c.num_layers * lora.rank * sum(widths[name] for name in lora.targets)


def training_bytes(config: ModelConfig, itemsize: int, pairs: int, tokens: int, remat: str) -> int:
    """Bytes of the activations of a microbatch of `pairs`, each of `tokens` tokens with both of its responses."""
    c, T = config, pairs * tokens
    saved = c.num_layers * T * c.embed_dim * itemsize  # each layer's input
    layer = 4 * T * (4 * c.mlp_dim + 12 * c.embed_dim + 4 * c.num_heads * c.head_dim)  # one layer, forward and backward
    every = {"layer": 1, "dots": c.num_layers / 4, "none": c.num_layers / 2}[remat]
    logits = 2 * 4 * 256 * c.vocab_size  # of a block of tokens, when no layer is at work
    return int(saved + max(layer * every, logits))


def training_needs(
    config: ModelConfig,
    lora: LoRAConfig,
    itemsize: int,
    *,
    pairs: int,
    tokens: int,
    remat: str,
    split: int = 1,
    quantized: bool = False,
) -> int:
    """Bytes of a device that trains on `pairs` pairs of `tokens` tokens at a time.

    Args:
      split: devices that weights and adapter are split over. Each then holds two layers gathered, and a table of the
        vocabulary in two layouts.
    """
    weights, held = weight_bytes(config, itemsize, quantized), adapter_bytes(config, lora)
    gathered = 0
    if split > 1:
        table = itemsize * config.vocab_size * config.embed_dim
        layers = weights - table * (1 if config.tie_embeddings else 2)
        gathered = 2 * table + 2 * layers // config.num_layers
    return (weights + held) // split + gathered + training_bytes(config, itemsize, pairs, tokens, remat)


def for_training(
    config: ModelConfig,
    lora: LoRAConfig,
    itemsize: int,
    *,
    devices: int,
    memory: float | None,
    pairs: int,
    tokens: int,
    remat: str,
    quantized: bool = False,
) -> Choice:
    """Choose the mesh to train with.

    Args:
      memory: bytes of a device, or None if they are not known, as on a CPU.
      pairs: of a microbatch.
      tokens: of a pair, prompt and both responses.
    """
    bytes_of = functools.partial(
        training_needs,
        config,
        lora,
        itemsize,
        pairs=-(-pairs // devices),
        tokens=tokens,
        remat=remat,
        quantized=quantized,
    )
    needs = bytes_of()
    if devices == 1 or memory is None or needs <= _HEADROOM * memory:
        return Choice({"data": devices, "fsdp": 1, "tensor": 1}, _why(needs, memory, "replicated"))
    return Choice({"data": 1, "fsdp": devices, "tensor": 1}, _why(bytes_of(split=devices), memory, "split"))


def for_decoding(
    config: ModelConfig,
    itemsize: int,
    *,
    devices: int,
    memory: float | None,
    slots: int,
    slot_bytes: Callable[[int], int],
    copies: int = 1,
    quantized: bool = False,
) -> Choice:
    """Choose the mesh to decode with.

    Args:
      devices: of one process; each decodes by itself.
      slots: questions at a time.
      slot_bytes: bytes of one of them on each of so many devices as split heads and vocabulary.
      copies: of the weights that decoding holds.
    """
    weights = copies * weight_bytes(config, itemsize, quantized)
    for tensor in (t for t in range(1, devices + 1) if devices % t == 0):
        needs = weights / tensor + -(-slots // (devices // tensor)) * slot_bytes(tensor)
        if memory is None or needs <= _HEADROOM * memory:
            break
    how = "replicated" if tensor == 1 else f"split over {tensor} devices"
    return Choice({"data": devices // tensor, "fsdp": 1, "tensor": tensor}, _why(needs, memory, how))


def most_questions(weights: int, mesh: Mesh, memory: float, slot_bytes: int) -> int:
    """How many questions at a time the memory of a mesh's devices should hold beside `weights` bytes of weights."""
    split = mesh.size // mesh.shape["data"]
    copies = 2 if prefers_unstacked_layers(mesh) else 1
    free = _HEADROOM * memory - copies * weights / split
    return max(0, int(free // slot_bytes)) * mesh.size // mesh.shape["tensor"]


def most_pairs(
    config: ModelConfig,
    lora: LoRAConfig,
    itemsize: int,
    mesh: Mesh,
    *,
    memory: float,
    tokens: int,
    remat: str,
    quantized: bool = False,
) -> int:
    """How many pairs of `tokens` tokens in a microbatch the memory of a mesh's devices should hold beside weights."""
    needs = functools.partial(
        training_needs,
        config,
        lora,
        itemsize,
        tokens=tokens,
        remat=remat,
        split=mesh.size // mesh.shape["data"],
        quantized=quantized,
    )
    pairs = bisect.bisect_right(range(1, 1 << 20), _HEADROOM * memory, key=lambda pairs: needs(pairs=pairs))
    return pairs * mesh.size // mesh.shape["tensor"]


def accumulation(config: ConfigDict, model: ModelConfig, lora: LoRAConfig, mesh: Mesh) -> int:
    """Microbatches of a training step: `config.train.accumulate`, or if that is 0 as few as should fit.

    Microbatches are of one size, and of a multiple of the devices that share them where the batch is.
    """
    train = config.train
    memory = config.mesh.memory_gb * 1e9 or hardware.memory_of(mesh.devices.flat[0])
    if train.accumulate or memory is None:
        return train.accumulate or 1
    itemsize = jnp.dtype(config.dtype).itemsize
    fits = most_pairs(
        model,
        lora,
        itemsize,
        mesh,
        memory=memory,
        tokens=config.prompt.max_tokens + 2 * train.max_response,
        remat=train.remat,
        quantized=bool(config.base_dtype),
    )
    equal = [count for count in range(1, train.batch + 1) if train.batch % count == 0]
    shared = [count for count in equal if train.batch // count % sharding.devices("batch", mesh) == 0] or equal
    return next((count for count in shared if train.batch // count <= fits), shared[-1])


def _why(needs: float, memory: float | None, how: str) -> str:
    limit = f" of {memory / 1e9:.1f} GB" if memory else ""
    return f"about {needs / 1e9:.1f} GB{limit} per device; weights {how}"
