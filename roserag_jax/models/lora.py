"""A linear layer with its low-rank adapter inside (LoRA, arXiv 2106.09685, equation 3).

Axes: T flattened tokens, L layers, D_in and D_out the widths of a projection, r rank. Parameters are stacked over the
layers, so a declaration has the layer axis and a call does not. Weights are [D_out, D_in], as Hugging Face keeps them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from roserag_jax.models.quantization import quantize

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRAParam(nnx.Variable):
    """An adapter weight: what is trained, saved and exported; every other parameter is frozen."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Rank, scale and targets of an adapter; rank 0 means no adapter."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor of the low-rank product: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


_FEW_TOKENS = 128


def project(x: Float[Array, "T D_in"], weight: Float[Array, "D_out D_in"], dtype=None) -> Float[Array, "T D_out"]:
    """`x @ weight.T`, summed and returned in `dtype` (by default that of the operands).

    A matmul on a CPU begins by copying its second operand into an order of its own. With few tokens, as in decoding,
    that would cost as much as the matmul if it were the weight; the optimization barriers keep XLA from swapping the
    operands back.
    """
    matmul = functools.partial(jnp.matmul, preferred_element_type=dtype)
    tokens_first = lambda x, weight: matmul(x, weight.T)
    barrier = jax.lax.optimization_barrier
    weight_first = lambda x, weight: barrier(matmul(weight, barrier(x.T))).T
    if x.shape[0] > _FEW_TOKENS:
        return tokens_first(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=tokens_first)


class Linear(nnx.Module):
    """`x @ weight.T + bias + scale * dropout(x) @ A @ B`, for one projection of every layer."""

    def __init__(self, name, config, in_dim, out_dim, axes, lora: LoRAConfig, dtype, rngs, bias=False, quantized=False):
        L, bound = config.num_layers, in_dim**-0.5
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        self.name = name
        weight, scale = nnx.initializers.normal(0.02)(rngs.params(), (L, out_dim, in_dim), dtype), None
        if quantized:
            weight, scale = quantize(weight)
        self.weight = nnx.Param(weight, axes=("layers", *axes[::-1]))
        self.weight_scale = nnx.Param(scale, axes=("layers", axes[1])) if quantized else None
        self.bias = nnx.Param(jnp.zeros((L, out_dim), dtype), axes=("layers", axes[1])) if bias else None
        self.lora = lora if lora.rank and name in lora.targets else None
        if self.lora:
            # PEFT's initialization: A is Kaiming-uniform with a = sqrt(5), B is zero, so training starts at the base.
            r = lora.rank
            self.lora_a = LoRAParam(uniform(rngs.params(), (L, in_dim, r), jnp.float32), axes=("layers", axes[0], None))
            self.lora_b = LoRAParam(jnp.zeros((L, r, out_dim), jnp.float32), axes=("layers", None, axes[1]))

    def __call__(self, x: Float[Array, "T D_in"], dropout_key: Key[Array, ""] | None = None) -> Float[Array, "T D_out"]:
        """Project tokens; dropout applies to the adapter's input, and only when a key is given."""
        y = project(x, self.weight[...].astype(x.dtype))
        if self.weight_scale is not None:
            y = (y.astype(jnp.float32) * self.weight_scale[...]).astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...]
        if self.lora is not None:
            if dropout_key is not None and self.lora.dropout > 0:
                key = jax.random.fold_in(dropout_key, PROJECTIONS.index(self.name))
                keep = 1.0 - self.lora.dropout
                x = jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0).astype(x.dtype)
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            x = x.reshape(*a.shape[:-2], -1, x.shape[-1])  # in training on several devices each has its own copy
            y += (self.lora.scale * (x @ a) @ b).reshape(y.shape)
        return checkpoint_name(y, "projection")  # the sum alone: saved apart, its two terms would take twice the memory
