"""The mesh that suits a model and its devices.

Where weights, caches and activations fit on one device, weights are replicated: nothing but the adapter's gradients
then goes over the wire. Else decoding splits heads, MLP and vocabulary (tensor) over as few devices as it takes, so
that no weights are gathered for each token, and training splits the weights (fsdp), whose gathering a step's
arithmetic hides.

The sizes are estimates from the shapes; `roserag plan` compiles the programs and says what they really take.
"""

from typing import NamedTuple

from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig

_HEADROOM = 0.92  # of a device's memory; the rest is for what the estimates leave out


class Choice(NamedTuple):
    """Sizes of the mesh's axes, and why."""

    sizes: dict[str, int]
    why: str


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the frozen weights."""
    c = config
    heads = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
    return itemsize * (c.num_layers * (heads + 3 * c.embed_dim * c.mlp_dim) + tables)


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
    cached = 4 * c.num_layers * T * c.num_kv_heads * c.head_dim * itemsize  # keys and values, and their gradients
    layer = 4 * T * (4 * c.mlp_dim + 8 * c.embed_dim + 4 * c.num_heads * c.head_dim)  # one layer, forward and backward
    every = {"layer": 1, "dots": c.num_layers / 4, "none": c.num_layers / 2}[remat]
    return int(saved + cached + layer * every + 3 * 4 * 256 * c.vocab_size)  # and a block of logits


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
) -> Choice:
    """Choose the mesh to train with.

    Args:
      memory: bytes of a device, or None if they are not known, as on a CPU.
      pairs: of a microbatch.
      tokens: of a pair, prompt and both responses.
    """
    needs = weight_bytes(config, itemsize) + adapter_bytes(config, lora)
    needs += training_bytes(config, itemsize, -(-pairs // devices), tokens, remat)
    if devices == 1 or memory is None or needs <= _HEADROOM * memory:
        return Choice({"data": devices, "fsdp": 1, "tensor": 1}, _why(needs, memory, "replicated"))
    return Choice({"data": 1, "fsdp": devices, "tensor": 1}, _why(needs, memory, "split"))


def for_decoding(
    config: ModelConfig, itemsize: int, *, devices: int, memory: float | None, slots: int, slot_bytes: int
) -> Choice:
    """Choose the mesh to decode with.

    Args:
      devices: of one process; each decodes by itself.
      slots: questions at a time.
    """
    weights = weight_bytes(config, itemsize)
    for tensor in (t for t in range(1, devices + 1) if devices % t == 0):
        needs = weights / tensor + -(-slots // (devices // tensor)) * slot_bytes
        if memory is None or needs <= _HEADROOM * memory:
            break
    how = "replicated" if tensor == 1 else f"split over {tensor} devices"
    return Choice({"data": devices // tensor, "fsdp": 1, "tensor": tensor}, _why(needs, memory, how))


def _why(needs: float, memory: float | None, how: str) -> str:
    limit = f" of {memory / 1e9:.1f} GB" if memory else ""
    return f"about {needs / 1e9:.1f} GB{limit} per device; weights {how}"
