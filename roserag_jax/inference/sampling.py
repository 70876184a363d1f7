"""Sampling: one token of every row drawn from its logits.

Axes: R rows, V vocabulary, C columns.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature (0 is greedy), then the tokens that top-k, top-p and min-p all leave.

    top_k 0, top_p 1 and min_p 0 each keep the whole vocabulary; top-p counts its share within what top-k leaves, as
    transformers does.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def question_key(question_id: str) -> int:
    """A stable 32-bit number for a question, so that its samples depend on no batch, order or host."""
    return zlib.crc32(question_id.encode())


def _invert(weights: Float[Array, "R C"], uniform: Float[Array, "R"]) -> tuple[Array, Array]:
    """The entry at quantile `uniform` of each row's weights, and the quantile that is left over inside that entry."""
    total = jnp.cumsum(weights, axis=-1)
    wanted = uniform * total[:, -1]
    # Entries of weight zero are stepped over even when rounding puts the quantile on their edge.
    reached = (total > wanted[:, None]) & (weights > 0)
    entry = jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
    weight, upper = (jnp.take_along_axis(a, entry[:, None], axis=1)[:, 0] for a in (weights, total))
    return entry, jnp.clip((wanted - (upper - weight)) / weight, 0.0, 1.0)


def _threshold(logits: Float[Array, "R V"], weights: Float[Array, "R V"], wanted: Float[Array, "R"]) -> Array:
    """The largest logit so that the tokens from it upwards weigh `wanted` together, found by bisection: no sorting."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.where(logits >= middle[:, None], weights, 0).sum(-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    return jax.lax.fori_loop(0, 32, halve, (logits.min(-1), logits.max(-1)))[0]


def draw(logits: Float[Array, "R V"], keys, knobs: Float[Array, "R 4"]) -> Array:
    """One token per row: greedy at temperature 0, else a draw by inverting the distribution of the tokens that stay.

    One uniform number per row is enough (a Gumbel draw would need one per row and vocabulary entry). The inverse is
    taken in two levels, over blocks of the vocabulary and then inside the block, where float32 sums stay exact enough.

    Args:
      knobs: `Sampling`'s fields of each row. Top-p (the nucleus, arXiv 1904.09751), top-k and min-p (arXiv 2407.01082)
        each come down to the lowest logit that stays; a search that no row asks for is not run.
    """
    temperature, top_p, top_k, min_p = knobs.T

    def kept(scaled):
        """Scaled logits with what is cut at minus infinity."""
        everything = jnp.full(len(scaled), -jnp.inf)
        V, top = scaled.shape[1], scaled.max(-1)
        of_k = lambda: jnp.where(top_k > 0, _threshold(scaled, jnp.ones_like(scaled), jnp.minimum(top_k, V)), -jnp.inf)
        lowest = jax.lax.cond((top_k > 0).any(), of_k, lambda: everything)

        def of_p():
            weights = jnp.where(scaled >= lowest[:, None], jnp.exp(scaled - top[:, None]), 0)
            return jnp.where(top_p < 1, _threshold(scaled, weights, top_p * weights.sum(-1)), -jnp.inf)

        lowest = jnp.maximum(lowest, jax.lax.cond((top_p < 1).any(), of_p, lambda: everything))
        lowest = jnp.maximum(lowest, jnp.where(min_p > 0, top + jnp.log(min_p), -jnp.inf))
        return jnp.where(scaled >= lowest[:, None], scaled, -jnp.inf)

    def sampled():
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        cut = (top_p < 1) | (top_k > 0) | (min_p > 0)
        weights = jax.nn.softmax(jax.lax.cond(cut.any(), kept, lambda x: x, scaled), axis=-1)
        R, V = weights.shape
        width = 256
        blocks = jnp.pad(weights, ((0, 0), (0, -V % width))).reshape(R, -1, width)
        uniform = jax.vmap(jax.random.uniform)(keys)
        block, rest = _invert(blocks.sum(-1), uniform)
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        return jnp.where(temperature > 0, block * width + _invert(inside, rest)[0], jnp.argmax(logits, axis=-1))

    return jax.lax.cond((temperature > 0).any(), sampled, lambda: jnp.argmax(logits, axis=-1))
