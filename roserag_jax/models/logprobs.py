"""Log-probabilities of given tokens without the array of all logits.

Axes: T flattened tokens, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from roserag_jax.distributed.sharding import devices, partition_spec


def token_logprobs(
    hidden: Float[Array, "*batch D"],
    targets: Int[Array, "*batch"],
    table: Float[Array, "V D"],
    softcap: float | None = None,
    block: int = 256,
) -> Float[Array, "*batch"]:
    """Log-probability of each target under its hidden state, in float32, `block` tokens at a time.

    The vocabulary projection is frozen, so its gradient rule needs only the hidden states' side:
    d logp / d hidden = table[target] - softmax @ table (each times the soft-cap's slope). That row is computed in the
    forward pass, while the block's logits exist, so no logits are saved or recomputed.

    On a mesh each device takes the blocks of its own tokens. Left to the partitioner, every device runs the loop over
    all blocks, with an all-reduce of logits in each iteration where the table is sharded by `embed`.
    """
    if targets.size == 0:
        return jnp.zeros(targets.shape)

    of_tokens = lambda *arrays: _blocked(*arrays, softcap, block)
    tokens = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    mesh = jax.sharding.get_abstract_mesh()
    # Of the flattened tokens, which the devices may divide evenly where they do not divide the batch.
    over = None if mesh.empty else partition_spec((targets.size,), ("batch",), mesh)[0]
    if over and devices("batch", mesh) > 1:
        split, replicated = PartitionSpec(over), PartitionSpec()
        # The tensor axis is left to the partitioner, which sums over the shards of the vocabulary.
        of_tokens = jax.shard_map(of_tokens, in_specs=(split, split, replicated), out_specs=split, axis_names=set(over))
    return of_tokens(*tokens, table).reshape(targets.shape)


def _logits(hidden, table, softcap):
    logits = jnp.einsum("td,vd->tv", hidden, table, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _over_blocks(function, block, *arrays):
    """Map `function` over blocks of rows, the last one padded; one block is called without a loop."""
    T = arrays[0].shape[0]
    block = min(block, T)
    count = -(-T // block)
    padded = [jnp.pad(a, [(0, count * block - T)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
    if count == 1:
        return function(*padded)
    stacked = [a.reshape(count, block, *a.shape[1:]) for a in padded]
    out = jax.lax.map(lambda xs: function(*xs), tuple(stacked))
    return jax.tree.map(lambda a: a.reshape(count * block, *a.shape[2:])[:T], out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocked(hidden, targets, table, softcap, block):
    def one(hidden, targets):
        logits = _logits(hidden, table, softcap)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=1)

    return _over_blocks(one, block, hidden, targets)


def _forward(hidden, targets, table, softcap, block):
    def one(hidden, targets):
        logits = _logits(hidden, table, softcap)
        chosen = jnp.arange(logits.shape[1]) == targets[:, None]
        normalizer = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        slope = chosen - jnp.exp(logits - normalizer)
        if softcap is not None:
            slope *= 1 - jnp.square(logits / softcap)
        rows = jnp.einsum("tv,vd->td", slope.astype(table.dtype), table, preferred_element_type=jnp.float32)
        return jnp.where(chosen, logits, 0).sum(1) - normalizer[:, 0], rows

    logprobs, rows = _over_blocks(one, block, hidden, targets)
    return logprobs, (rows.astype(hidden.dtype), targets, table)


def _backward(softcap, block, saved, gradient):
    rows, targets, table = saved
    to_hidden = (gradient[:, None] * rows).astype(rows.dtype)
    return to_hidden, np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(table)


_blocked.defvjp(_forward, _backward)
