"""The encoder of the BERT family: every word piece attends to every other of its text.

Axes: R rows (texts), W word pieces of a text, T flattened tokens, L layers, D model width, H heads, h head size.

It differs from the decoder in all parts of the block: norms come after the sums and have a mean and a bias, positions
are learned, the MLP has no gate. RoBERTa and XLM-R are the same network whose positions begin behind the padding id.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.models.lora import Linear, LoRAConfig
from roserag_jax.models.transformer import ACTIVATIONS

_MASKED = -1e30
_NO_ADAPTER = LoRAConfig()


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and mathematics of an encoder. Hashable, so that it can be closed over by `jit`."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    position_rows: int
    type_rows: int
    norm_eps: float
    activation: str = "gelu"
    first_position: int = 0  # row of the position table that a text's first word piece takes

    @property
    def max_positions(self) -> int:
        """Most word pieces of a text."""
        return self.position_rows - self.first_position


class LayerNorm(nnx.Module):
    """Layer norm in float32, with weight and bias."""

    def __init__(self, config: BertConfig, shape, axes, dtype):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(shape, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Normalize the last axis."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class BertLayer(nnx.Module):
    """One encoder layer, declared stacked over all L and called on one slice of itself."""

    def __init__(self, config: BertConfig, dtype, rngs: nnx.Rngs):
        c, L, D = config, config.num_layers, config.embed_dim
        linear = lambda name, i, o, axes: Linear(name, c, i, o, axes, _NO_ADAPTER, dtype, rngs, bias=True)
        self.config = c
        self.q_proj = linear("q_proj", D, D, ("embed", "heads"))
        self.k_proj = linear("k_proj", D, D, ("embed", "heads"))
        self.v_proj = linear("v_proj", D, D, ("embed", "heads"))
        self.o_proj = linear("o_proj", D, D, ("heads", "embed"))
        self.up_proj = linear("up_proj", D, c.mlp_dim, ("embed", "mlp"))
        self.down_proj = linear("down_proj", c.mlp_dim, D, ("mlp", "embed"))
        self.attn_norm = LayerNorm(c, (L, D), ("layers", None), dtype)
        self.mlp_norm = LayerNorm(c, (L, D), ("layers", None), dtype)

    def __call__(self, x: Float[Array, "T D"], mask: Bool[Array, "R W"]) -> Float[Array, "T D"]:
        """The block: attention, then the MLP, each added to its input and normed."""
        x = self.attn_norm(x + self.o_proj(self.attend(x, mask)))
        up = self.up_proj(x).astype(jnp.float32)
        return self.mlp_norm(x + self.down_proj(ACTIVATIONS[self.config.activation](up).astype(x.dtype)))

    def attend(self, x: Float[Array, "T D"], mask: Bool[Array, "R W"]) -> Float[Array, "T D"]:
        """Attention of all word pieces of a text to those of them that `mask` shows."""
        (R, W), H = mask.shape, self.config.num_heads
        q, k, v = (p(x).reshape(R, W, H, -1).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = jnp.matmul(q * q.shape[-1] ** -0.5, k.mT, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(x.dtype)
        return (weights @ v).swapaxes(1, 2).reshape(x.shape)


class Bert(nnx.Module):
    """BERT without its pooler.

    Args:
      config: sizes and mathematics.
      dtype: of weights and activations; norms and softmax are float32.
      rngs: for a random network; weights are otherwise loaded over an abstract one (`hub.encoder`).
    """

    def __init__(self, config: BertConfig, dtype: Any, rngs: nnx.Rngs):
        D = config.embed_dim
        table = lambda rows, axes: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (rows, D), dtype), axes=axes)
        self.config = config
        self.embed = table(config.vocab_size, ("vocab", "embed"))
        self.positions = table(config.position_rows, (None, "embed"))
        self.types = table(config.type_rows, (None, "embed"))
        self.embed_norm = LayerNorm(config, (D,), (None,), dtype)
        self.layers = BertLayer(config, dtype, rngs)

    def __call__(self, tokens: Int[Array, "R W"], mask: Bool[Array, "R W"]) -> Float[Array, "R W D"]:
        """Hidden states of all word pieces, also of those that `mask` hides from the others (ColBERT uses them)."""
        (R, W), first = tokens.shape, self.config.first_position
        x = self.embed[...][tokens] + self.positions[...][first : first + W] + self.types[...][0]
        graph, layers = nnx.split(self.layers)
        step = lambda x, layer: (nnx.merge(graph, layer)(x, mask), None)
        x, _ = jax.lax.scan(step, self.embed_norm(x.reshape(R * W, -1)), layers)
        return x.reshape(R, W, -1)
