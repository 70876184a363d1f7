"""Logical axes: which mesh axes each dimension of a parameter or activation is sharded over.

The mesh has axes ('data', 'fsdp', 'tensor'). A dimension that its mesh axes do not divide evenly is replicated, so
any model runs on any mesh (three key/value heads on a tensor axis of two, say), only less sharded.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def devices(name: str | None, mesh) -> int:
    """How many devices of a mesh a logical axis is sharded over; of an empty mesh, one."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES.get(name, ()))


def held_kv_heads(heads: int, kv_heads: int, split: int) -> int:
    """How many key/value heads are held by `split` devices that query heads are split over, copies counted.

    Each is held as often as it takes to give every device those of its own queries, and no others. Devices that do not
    divide the query heads hold all of them, which is no copy here.
    """
    sharing = heads // kv_heads
    copies = (n for n in range(1, sharing + 1) if sharing % n == 0 and kv_heads * n % split == 0)
    return kv_heads * next(copies, 1)


def partition_spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh) -> PartitionSpec:
    """Mesh axes for an array of `shape` whose dimensions carry the logical names `axes`; None is replicated."""
    entries = []
    for size, name in zip(shape, axes, strict=True):
        over = RULES.get(name, ())
        fits = over and size % devices(name, mesh) == 0
        entries.append(over if fits else None)
    return PartitionSpec(*entries)


def sharding(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """`partition_spec` bound to its mesh."""
    return NamedSharding(mesh, partition_spec(shape, axes, mesh))


def state_shardings(tree, mesh: Mesh):
    """Shardings of a tree, leaf by leaf: a parameter's from the `axes` that it declared, any other leaf replicated."""
    is_variable = lambda leaf: hasattr(leaf, "get_metadata")

    def place(leaf):
        if not is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        return leaf.replace(sharding(leaf.get_value().shape, leaf.get_metadata()["axes"], mesh))

    return jax.tree.map(place, tree, is_leaf=is_variable)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes under the ambient mesh (`jax.set_mesh`); without one, do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))
