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


def take_slots(prompts: tuple, slots: jax.Array) -> tuple:
    """Read W prompts of each device: keys [X*W K h P] and values [X*W K P h], stacked or unstacked as the cache is.

    Args:
      prompts: keys and values of the prefix cache.
      slots: the slots to read, counted within their devices, [X*W].
    """
    return _for_each_layer(lambda of_layer, _: _take(of_layer, slots), prompts)


def put_slots(prompts: tuple, rows: tuple, slots: jax.Array, served: jax.Array) -> tuple:
    """Write W prompts of each device into their slots, from the front of the token axis; `prompts` is donated.

    Args:
      prompts: keys and values of the prefix cache.
      rows: keys [L X*W K h P] and values [L X*W K P h].
      slots: the slots to write, counted within their devices, [X*W].
      served: False for rows that are not written, [X*W]; they come last among those of a device.
    """
    put = lambda of_layer, layer: _put(PREFIX_AXES, of_layer, rows, layer, slots, served, None)
    return _for_each_layer(put, prompts)


def put_rings(suffix: tuple, rows: tuple, slots: jax.Array, served: jax.Array, first: jax.Array) -> tuple:
    """Write branches as `put_slots` does prompts, but as rings: from entry `first` [X*W] on, wrapping round at the end.

    Each slot has a `first` of its own, because a row is padded to the longest that is written together: only then does
    its padding take no place among the entries that the slot's own tokens need.

    Args:
      suffix: keys and values of the suffix cache.
      rows: keys [L X*W K N h S] and values [L X*W K N S h].
    """
    put = lambda of_layer, layer: _put(SUFFIX_AXES, of_layer, rows, layer, slots, served, first)
    return _for_each_layer(put, suffix)


def put_entries(entries: tuple, rows: tuple, slots: jax.Array, served: jax.Array) -> tuple:
    """Write what belongs to the entries of the suffix cache, arrays [B N M], as `put_slots` does; they are donated."""
    return _put(("batch", None, None), entries, rows, None, slots, served, None)


def _for_each_layer(function, cache: tuple) -> tuple:
    """Call `function(keys and values, layer)` on all layers at once, or on each where they are unstacked.

    Each call runs a program of its own: one for thirty unstacked layers takes longer to compile than the network.
    """
    if not isinstance(cache[0], tuple):
        return function(cache, None)
    return tuple(zip(*(function(of_layer, i) for i, of_layer in enumerate(zip(*cache, strict=True))), strict=True))


@jax.jit
def _take(arrays: tuple, slots):
    stacked = arrays[0].ndim - len(PREFIX_AXES)

    def take(arrays, slots):
        W = slots.shape[0]

        def copy(w, rows):
            read = lambda a: jax.lax.dynamic_slice_in_dim(a, slots[w], 1, axis=stacked)
            write = lambda row, a: jax.lax.dynamic_update_slice_in_dim(row, read(a), w, axis=stacked)
            return jax.tree.map(write, rows, arrays)

        first_slots = jax.tree.map(lambda a: jax.lax.slice_in_dim(a, 0, W, axis=stacked), arrays)
        return jax.lax.fori_loop(0, W, copy, first_slots)  # all of them are overwritten

    return _on_each_device(take, PREFIX_AXES, arrays, slots)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put(axes: tuple, arrays: tuple, rows: tuple, layer, slots, served, first):
    """Write rows into their slots, as rings where `first` is given; `layer` of the rows into arrays of one layer."""
    stacked = arrays[0].ndim - len(axes)
    if layer is not None:
        rows = tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in rows)

    def put(arrays, rows, slots, served, first):
        def write(w, arrays):
            def into(a, rows, token_axis):
                row = jax.lax.dynamic_slice_in_dim(rows, w, 1, axis=stacked)
                if first is not None:
                    widths = [(0, 0)] * row.ndim
                    widths[token_axis] = (0, a.shape[token_axis] - row.shape[token_axis])
                    row = jnp.roll(jnp.pad(row, widths), first[w], token_axis)
                start = [0] * a.ndim
                start[stacked] = slots[w]
                return jax.lax.dynamic_update_slice(a, row, start)

            return tuple(map(into, arrays, rows, (-1, -2)))

        return jax.lax.fori_loop(0, served.sum(), write, arrays)

    return _on_each_device(put, axes, arrays, rows, slots, served, first)


def _on_each_device(function, axes: tuple, arrays: tuple, *rest):
    """Call `function(arrays, *rest)` on each device's own slots; all arrays are split over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = (None,) * (arrays[0].ndim - len(axes)) + axes
    spec = lambda a: partition_spec(a.shape, axes if a.ndim == len(axes) else ("batch",), mesh)
    specs = jax.tree.map(spec, (arrays, *rest))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0])(arrays, *rest)
