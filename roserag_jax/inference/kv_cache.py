"""KV caches of the decoder's slots: their sizes and allocation, and how one slot on each device is read and written.

Axes: B slots, X devices that slots are split over, N branches, P prompt, M suffix-cache length, L layers,
K key/value heads, h head size.

Two caches belong to a slot. The prefix cache [L B K h P] holds its prompt, which all branches read. The suffix cache
[L B K N h M] holds each branch's own tokens. Both are stacked over layers, or unstacked (a tuple with an array for each
layer) where the engine's layers are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from roserag_jax.distributed.sharding import partition_spec, sharding
from roserag_jax.models.cache import unstack
from roserag_jax.models.config import ModelConfig

PREFIX_AXES = ("batch", "heads", None, None)
SUFFIX_AXES = ("batch", "heads", None, None, None)


def allocate_prefix(config: ModelConfig, slots: int, length: int, *, dtype, mesh: Mesh, stacked: bool) -> tuple:
    """Empty keys [L B K h P] and values [L B K P h] of the prompts."""
    heads, h = (slots, config.num_kv_heads), config.head_dim
    shapes = (*heads, h, length), (*heads, length, h)
    return tuple(_allocate(config.num_layers, shape, PREFIX_AXES, dtype, mesh, stacked) for shape in shapes)


def allocate_suffix(
    config: ModelConfig, slots: int, branches: int, length: int, *, dtype, mesh: Mesh, stacked: bool
) -> tuple:
    """Empty keys [L B K N h M] and values [L B K N M h] of the branches."""
    heads, h = (slots, config.num_kv_heads, branches), config.head_dim
    shapes = (*heads, h, length), (*heads, length, h)
    return tuple(_allocate(config.num_layers, shape, SUFFIX_AXES, dtype, mesh, stacked) for shape in shapes)


def _allocate(num_layers, shape, axes, dtype, mesh, stacked):
    zeros = lambda shape, axes: jnp.zeros(shape, dtype, device=sharding(shape, axes, mesh))
    if stacked:
        return zeros((num_layers, *shape), (None, *axes))
    return tuple(zeros(shape, axes) for _ in range(num_layers))


def take_slot(cache, axes: tuple, slots: jax.Array):
    """Read one slot of each device, [L X ...]: the `slots` [X], counted within each device."""

    def take(slot_axis, cache, slot):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot[0], 1, axis=slot_axis), cache)

    rows = _on_each_device(take, axes, cache, slots)
    return jnp.stack(rows) if isinstance(rows, tuple) else rows


def put_slot(cache, axes: tuple, rows, slots: jax.Array, served: jax.Array):
    """Write `rows` [L X ...], one for each device, into its slot `slots` [X], from the front of all other axes.

    Devices where `served` [X] is False keep what they have.
    """

    def put(slot_axis, cache, rows, slot, served):
        return jax.tree.map(lambda a, row: _write(a, row, slot_axis, slot[0], served[0]), cache, rows)

    return _on_each_device(put, axes, cache, _as_cache(cache, rows), slots, served)


def put_ring(cache, axes: tuple, rows, token_axis: int, slots: jax.Array, served: jax.Array, first: jax.Array):
    """Write `rows` [L X ...] as `put_slot` does, but as a ring: tokens from `first` [X] on, wrapping round at the end.

    Each slot has a `first` of its own, because a row is padded to the longest that is written together: only then does
    its padding take no place among the entries that the slot's own tokens need.

    Args:
      token_axis: the axis of tokens, counted from the end.
    """

    def put(slot_axis, cache, rows, slot, served, first):
        def write(a, row):
            widths = [(0, 0)] * row.ndim
            widths[token_axis] = (0, a.shape[token_axis] - row.shape[token_axis])
            ring = jnp.roll(jnp.pad(row, widths), first[0], token_axis)
            return _write(a, ring, slot_axis, slot[0], served[0])

        return jax.tree.map(write, cache, rows)

    return _on_each_device(put, axes, cache, _as_cache(cache, rows), slots, served, first)


def _as_cache(cache, rows):
    return unstack(rows) if isinstance(cache, tuple) else rows


def _write(a, row, slot_axis, slot, served):
    start = [0] * a.ndim
    start[slot_axis] = slot
    row = jnp.where(served, row, jax.lax.dynamic_slice(a, start, row.shape))
    return jax.lax.dynamic_update_slice(a, row, start)


def _on_each_device(function, axes, cache, *rest):
    """Call `function(slot_axis, cache, *rest)` on each device's own slots; all arrays are split over devices."""
    mesh, stacked = jax.sharding.get_abstract_mesh(), not isinstance(cache, tuple)
    axes = (None, *axes) if stacked else axes
    spec = lambda a: partition_spec(a.shape, axes if a.ndim == len(axes) else ("batch",), mesh)
    specs = jax.tree.map(spec, (cache, *rest))
    function = functools.partial(function, int(stacked))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0])(cache, *rest)
