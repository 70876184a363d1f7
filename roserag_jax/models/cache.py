"""The two KV caches of decoding behind a prompt: the prompts', shared by all branches, and the branches' own suffixes.

Axes: B batch (prompts), N branches per prompt, P prompt tokens, S branch tokens, M suffix-cache length, L layers,
K key/value heads, h head size.

Values are [..., tokens, h] and keys [..., h, tokens], as `models.attention` multiplies them. Both are stacked over the
layers, or unstacked: a tuple of one array per layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.models.pytree import HostArray, pytree_dataclass


@pytree_dataclass
class PrefixCache:
    """Keys and values of the prompts, read by every branch and never written.

    Attributes:
      k: keys of P tokens, right-padded.
      v: their values.
      lengths: tokens of each prompt that its branches attend to.
    """

    k: Float[Array, "L B K h P"] | tuple[Float[Array, "B K h P"], ...]
    v: Float[Array, "L B K P h"] | tuple[Float[Array, "B K P h"], ...]
    lengths: Int[HostArray, "B"]


@pytree_dataclass
class SuffixCache:
    """Keys and values of the branches themselves, in ring buffers of length M.

    All branches write at the same position of their buffer, so each may have begun at any time.

    Attributes:
      k: keys of each branch's tokens.
      v: their values.
      positions: position of each token in its sequence, prompt included.
      used: which entries hold a token of the branch.
      write_position: where the next tokens are written.
    """

    k: Float[Array, "L B K N h M"] | tuple[Float[Array, "B K N h M"], ...]
    v: Float[Array, "L B K N M h"] | tuple[Float[Array, "B K N M h"], ...]
    positions: Int[HostArray, "B N M"]
    used: Bool[HostArray, "B N M"]
    write_position: Int[HostArray, ""]

    def append(
        self, real: Bool[Array, "B N S"], lengths: Int[Array, "B"]
    ) -> tuple["SuffixCache", Int[Array, "B N S"], Bool[Array, "B N S M"]]:
        """Make room for S tokens of every branch: the cache with all but their keys and values, their positions, and
        the entries that each of them attends to.

        Args:
          real: False for padding, which takes an entry but no position and is never attended to.
          lengths: tokens of each prompt.
        """
        S, M = real.shape[2], self.used.shape[2]
        first = lengths[:, None, None] + self.used.sum(-1, keepdims=True)
        positions = first + jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
        at = (0, 0, self.write_position)
        used = jax.lax.dynamic_update_slice(self.used, real, at)
        key_positions = jax.lax.dynamic_update_slice(self.positions, positions, at)
        age = jnp.arange(M) - self.write_position  # of the entries written now: 0 to S - 1
        later = (age > jnp.arange(S)[:, None]) & (age < S)
        cache = dataclasses.replace(
            self, positions=key_positions, used=used, write_position=(self.write_position + S) % M
        )
        return cache, positions, used[:, :, None, :] & ~later


def unstack(tree: Any) -> tuple:
    """A tree of arrays stacked over layers as one tree per layer."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(structure.unflatten(of_layer) for of_layer in zip(*leaves, strict=True))
