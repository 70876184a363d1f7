"""Sampling: one token of every row drawn from its logits.

Axes: R rows, V vocabulary; E entries of a row of weights.
"""

import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from roserag_jax.distributed.sharding import devices
from roserag_jax.models.pytree import HostArray, pytree_dataclass

_HALVINGS = 32  # of the interval in which a threshold is searched
_BLOCK = 256  # tokens of a block of the vocabulary, the first of two levels of the draw


@pytree_dataclass
class SamplingParams:
    """How tokens are drawn: as numbers for a request, as arrays with an entry for each slot or row on the devices.

    Args:
      temperature: what logits are divided by; 0 is greedy.
      top_p: the likeliest tokens that make up this probability stay (the nucleus, arXiv 1904.09751), counted within
        what top-k leaves, as transformers does; 1 keeps all.
      top_k: this many of the likeliest tokens stay; 0 keeps all.
      min_p: tokens at least this times as likely as the likeliest stay (arXiv 2407.01082); 0 keeps all.
    """

    temperature: float | Float[HostArray, "R"] = 0.0
    top_p: float | Float[HostArray, "R"] = 1.0
    top_k: int | Int[HostArray, "R"] = 0
    min_p: float | Float[HostArray, "R"] = 0.0


def question_seed(question_id: str) -> int:
    """A stable 32-bit number for a question, so that its samples depend on no batch, order or host."""
    return zlib.crc32(question_id.encode())


def sample_tokens(logits: Float[Array, "R V"], keys, params: SamplingParams) -> Int[Array, "R"]:
    """Sample one token per row: greedy at temperature 0, else a draw from the tokens that top-k, top-p and min-p leave.

    The draw inverts the cumulative distribution, so one uniform number per row is enough (a Gumbel draw would need one
    per row and vocabulary entry). The inverse is taken in two levels, over blocks of the vocabulary and then inside the
    block, where float32 sums stay exact enough.

    Args:
      params: sampling parameters of each row. What no row asks for is not computed.
    """
    greedy = lambda: jnp.argmax(logits, axis=-1)

    def sampled():
        temperature = params.temperature
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        filters = (params.top_p < 1) | (params.top_k > 0) | (params.min_p > 0)
        kept = jax.lax.cond(filters.any(), lambda x: _filter_logits(x, params), lambda x: x, scaled)
        return jnp.where(temperature > 0, _sample_categorical(kept, keys), greedy())

    return jax.lax.cond((params.temperature > 0).any(), sampled, greedy)


def _filter_logits(logits: Float[Array, "R V"], params: SamplingParams) -> Float[Array, "R V"]:
    """Set the logits that top-k, top-p and min-p cut to minus infinity; each comes down to a lowest logit."""
    top_p, top_k, min_p = params.top_p, params.top_k, params.min_p
    everything = jnp.full(len(logits), -jnp.inf)
    V, top = logits.shape[1], logits.max(-1)

    def lowest_of_top_k():
        found = _threshold(logits, jnp.ones_like(logits), jnp.minimum(top_k, V))
        return jnp.where(top_k > 0, found, -jnp.inf)

    lowest = jax.lax.cond((top_k > 0).any(), lowest_of_top_k, lambda: everything)

    def lowest_of_top_p():
        weights = jnp.where(logits >= lowest[:, None], jnp.exp(logits - top[:, None]), 0)
        return jnp.where(top_p < 1, _threshold(logits, weights, top_p * weights.sum(-1)), -jnp.inf)

    lowest = jnp.maximum(lowest, jax.lax.cond((top_p < 1).any(), lowest_of_top_p, lambda: everything))
    lowest = jnp.maximum(lowest, jnp.where(min_p > 0, top + jnp.log(min_p), -jnp.inf))
    return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)


def _threshold(logits: Float[Array, "R V"], weights: Float[Array, "R V"], wanted) -> Float[Array, "R"]:
    """Find the largest logit so that the tokens from it upwards weigh `wanted` together, by bisection, not sorting.

    An accelerator takes three halvings in one pass over the logits, since it is reading them that costs; a CPU, where
    sums cost more, takes one. Both try the same thresholds.
    """
    search = lambda levels: functools.partial(_bisect, levels=levels)
    return jax.lax.platform_dependent(logits, weights, wanted, cpu=search(1), default=search(3))


def _bisect(logits, weights, wanted, levels: int) -> Float[Array, "R"]:
    """Halve the interval of thresholds `_HALVINGS` times, `levels` times in each pass over the logits."""

    def halve(levels, bounds):
        grid = list(bounds)  # the thresholds that so many halvings can come to, in ascending order
        for _ in range(levels):
            middles = [(low + high) / 2 for low, high in itertools.pairwise(grid)]
            grid = [*itertools.chain(*zip(grid, middles, strict=False)), grid[-1]]
        enough = [jnp.where(logits >= t[:, None], weights, 0).sum(-1) >= wanted for t in grid[1:-1]]
        last = sum(enough, jnp.zeros(len(logits), jnp.int32))  # the sums fall as the thresholds rise
        pick = lambda i: jnp.take_along_axis(jnp.stack(grid), i[None], axis=0)[0]
        return pick(last), pick(last + 1)

    passes, rest = divmod(_HALVINGS, levels)
    bounds = logits.min(-1), logits.max(-1)
    bounds = jax.lax.fori_loop(0, passes, lambda _, bounds: halve(levels, bounds), bounds)
    return (halve(rest, bounds) if rest else bounds)[0]


def _sample_categorical(logits: Float[Array, "R V"], keys) -> Int[Array, "R"]:
    """Draw a token of every row from the softmax of its logits, with a uniform number from its key."""
    weights = jax.nn.softmax(logits, axis=-1)
    R, V = weights.shape
    # A block never has entries of two devices: else they would have to send each other most of the weights.
    split = devices("vocab", jax.sharding.get_abstract_mesh())
    part = V if V % split else V // split
    parts = jnp.pad(weights.reshape(R, -1, part), ((0, 0), (0, 0), (0, -part % _BLOCK)))
    blocks = parts.reshape(R, -1, _BLOCK)
    uniform = jax.vmap(jax.random.uniform)(keys)
    block, rest = _inverse_cdf(blocks.sum(-1), uniform)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    of_part, block = jnp.divmod(block, parts.shape[2] // _BLOCK)
    return of_part * part + block * _BLOCK + _inverse_cdf(inside, rest)[0]


def _inverse_cdf(weights: Float[Array, "R E"], uniform: Float[Array, "R"]) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """Find the entry at quantile `uniform` of each row's weights, and the quantile that is left inside that entry."""
    total = jnp.cumsum(weights, axis=-1)
    wanted = uniform * total[:, -1]
    # Entries of weight zero are stepped over even when rounding puts the quantile on their edge.
    reached = (total > wanted[:, None]) & (weights > 0)
    entry = jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
    weight, upper = (jnp.take_along_axis(a, entry[:, None], axis=1)[:, 0] for a in (weights, total))
    return entry, jnp.clip((wanted - (upper - weight)) / weight, 0.0, 1.0)
