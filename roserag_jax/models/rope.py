"""Rotary position embedding (arXiv 2104.09864) with the scalings that models in use have.

Axes: T flattened tokens, h head size. A head is rotated in its two halves (half = h / 2), as in Hugging Face's layout.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(head_dim: int, theta: float, scaling: tuple = ()) -> Float[np.ndarray, "half"]:
    """Radians per position of each pair, with linear (arXiv 2306.15595) or Llama-3.1 scaling.

    Args:
      scaling: items of Hugging Face's `rope_parameters`; () is plain RoPE.
    """
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    options = dict(scaling)
    if options.get("rope_type") == "linear":
        inverse = inverse / options["factor"]
    elif options.get("rope_type") == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1's release).
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        rotations = options["original_max_position_embeddings"] * inverse / (2 * np.pi)
        blend = np.clip((rotations - low) / (high - low), 0, 1)
        inverse = (1 - blend) * inverse / options["factor"] + blend * inverse
    return inverse.astype(np.float32)


def tables(
    positions: Int[Array, "T"], inverse: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine of each position, in float32."""
    angles = positions[:, None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "T heads h"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T heads h"]:
    """Rotate the two halves of each head, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
