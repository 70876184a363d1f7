"""KV caches of the decoder's slots: their sizes and allocation, and how slots are read and written.

Axes: B slots, X devices that slots are split over, W slots of a device that are served together, N branches, P prompt,
M suffix-cache length, L layers, K key/value heads, h head size.

Two caches belong to a slot. The prefix cache [L B K h P] holds its prompt, which all branches read. The suffix cache
[L B K N h M] holds each branch's own tokens. Both are stacked over layers, or unstacked (a tuple with an array for each
layer) where the engine's layers are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from roserag_jax.distributed.sharding import devices, held_kv_heads, partition_spec, sharding
from roserag_jax.models.cache import unstack
from roserag_jax.models.config import ModelConfig

PREFIX_AXES = ("batch", "heads", None, None)
SUFFIX_AXES = ("batch", "heads", None, None, None)


def prefix_shapes(config: ModelConfig, slots: int, length: int, mesh: Mesh) -> tuple[tuple, tuple]:
    """Shapes of a layer's keys [B K h P] and values [B K P h] of the prompts, with the heads that a mesh holds."""
    heads, h = (slots, held_kv_heads(config.num_heads, config.num_kv_heads, devices("heads", mesh))), config.head_dim
    return (*heads, h, length), (*heads, length, h)


def suffix_shapes(config: ModelConfig, slots: int, branches: int, length: int, mesh: Mesh) -> tuple[tuple, tuple]:
    """Shapes of a layer's keys [B K N h M] and values [B K N M h] of the branches."""
    return tuple((B, K, branches, *rest) for B, K, *rest in prefix_shapes(config, slots, length, mesh))


def allocate_prefix(config: ModelConfig, slots: int, length: int, *, dtype, mesh: Mesh, stacked: bool) -> tuple:
    """Empty keys [L B K h P] and values [L B K P h] of the prompts."""
    shapes = prefix_shapes(config, slots, length, mesh)
    return tuple(_allocate(config.num_layers, shape, PREFIX_AXES, dtype, mesh, stacked) for shape in shapes)


def allocate_suffix(
    config: ModelConfig, slots: int, branches: int, length: int, *, dtype, mesh: Mesh, stacked: bool
) -> tuple:
    """Empty keys [L B K N h M] and values [L B K N M h] of the branches."""
    shapes = suffix_shapes(config, slots, branches, length, mesh)
    return tuple(_allocate(config.num_layers, shape, SUFFIX_AXES, dtype, mesh, stacked) for shape in shapes)


def _allocate(num_layers, shape, axes, dtype, mesh, stacked):
    zeros = lambda shape, axes: jnp.zeros(shape, dtype, device=sharding(shape, axes, mesh))
    if stacked:
        return zeros((num_layers, *shape), (None, *axes))
    return tuple(zeros(shape, axes) for _ in range(num_layers))


def take_slots(cache, axes: tuple, slots: jax.Array):
    """Read W slots of each device, [L X*W ...]: the `slots` [X*W], counted within each device."""

    def take(slot_axis, cache, slots):
        W = slots.shape[0]

        def copy(w, rows):
            read = lambda a: jax.lax.dynamic_slice_in_dim(a, slots[w], 1, axis=slot_axis)
            write = lambda row, a: jax.lax.dynamic_update_slice_in_dim(row, read(a), w, axis=slot_axis)
            return jax.tree.map(write, rows, cache)

        first_slots = jax.tree.map(lambda a: jax.lax.slice_in_dim(a, 0, W, axis=slot_axis), cache)
        return jax.lax.fori_loop(0, W, copy, first_slots)  # all of them are overwritten

    rows = _on_each_device(take, axes, cache, slots)
    return jnp.stack(rows) if isinstance(rows, tuple) else rows


def put_slots(cache, axes: tuple, rows, slots: jax.Array, served: jax.Array):
    """Write `rows` [L X*W ...], W of each device, into its `slots` [X*W], from the front of all other axes.

    Rows where `served` [X*W] is False are not written; they come last among those of a device.
    """

    def put(slot_axis, cache, rows, slots, served):
        return _write_rows(cache, rows, slot_axis, slots, served, lambda row, w: row)

    return _on_each_device(put, axes, cache, _as_cache(cache, rows), slots, served)


def put_rings(cache, axes: tuple, rows, token_axis: int, slots: jax.Array, served: jax.Array, first: jax.Array):
    """Write `rows` as `put_slots` does, but as rings: tokens from `first` [X*W] on, wrapping round at the end.

    Each slot has a `first` of its own, because a row is padded to the longest that is written together: only then does
    its padding take no place among the entries that the slot's own tokens need.

    Args:
      token_axis: the axis of tokens, counted from the end.
    """

    def put(slot_axis, cache, rows, slots, served, first):
        def pad(a, rows):
            widths = [(0, 0)] * rows.ndim
            widths[token_axis] = (0, a.shape[token_axis] - rows.shape[token_axis])
            return jnp.pad(rows, widths)

        as_ring = lambda row, w: jnp.roll(row, first[w], token_axis)
        return _write_rows(cache, jax.tree.map(pad, cache, rows), slot_axis, slots, served, as_ring)

    return _on_each_device(put, axes, cache, _as_cache(cache, rows), slots, served, first)


def _as_cache(cache, rows):
    return unstack(rows) if isinstance(cache, tuple) and not isinstance(rows, tuple) else rows


def _write_rows(cache, rows, slot_axis, slots, served, arrange):
    """Write `arrange(row, w)` of each row w that is served into its slot.

    In a loop: written out, the writes of eight rows to unstacked caches take far longer to compile than the network.
    """

    def write(w, cache):
        def into(a, rows):
            row = arrange(jax.lax.dynamic_slice_in_dim(rows, w, 1, axis=slot_axis), w)
            start = [0] * a.ndim
            start[slot_axis] = slots[w]
            return jax.lax.dynamic_update_slice(a, row, start)

        return jax.tree.map(into, cache, rows)

    return jax.lax.fori_loop(0, served.sum(), write, cache)


def _on_each_device(function, axes, cache, *rest):
    """Call `function(slot_axis, cache, *rest)` on each device's own slots; all arrays are split over devices."""
    mesh, stacked = jax.sharding.get_abstract_mesh(), not isinstance(cache, tuple)
    axes = (None, *axes) if stacked else axes
    spec = lambda a: partition_spec(a.shape, axes if a.ndim == len(axes) else ("batch",), mesh)
    specs = jax.tree.map(spec, (cache, *rest))
    function = functools.partial(function, int(stacked))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0])(cache, *rest)
