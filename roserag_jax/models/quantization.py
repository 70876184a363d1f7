"""Frozen weights in eight bits: half of bfloat16's memory, and half of its traffic.

Each output channel of a projection is rounded to integers of at most 127 with a scale of its own. Products are taken in
the activations' type, which holds these integers exactly, and scaled behind: the arithmetic stays floating-point, so
only the rounding of the weights is lost (weight-only quantization; the adapter is trained over it, as in QLoRA, arXiv
2305.14314, which has four bits).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

_LARGEST = 127  # -128 is left out, so that the range is symmetric


def quantize(weight: Float[Array, "*L D_out D_in"]) -> tuple[Int8[Array, "*L D_out D_in"], Float[Array, "*L D_out"]]:
    """Round weights to integers and return them with the scale of each output channel.

    A channel of zeros has the scale 1. One that is not finite has a scale that is not either.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(-1)
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST)
    return jnp.round(weight / scale[..., None]).astype(jnp.int8), scale
