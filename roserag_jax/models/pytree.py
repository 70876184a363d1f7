"""Dataclasses of arrays that JAX takes as arguments and results."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax
import numpy as np

HostArray = jax.Array | np.ndarray  # on the devices in a program; the host edits its copies between two
_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass whose fields are the children of a pytree.

    JAX rebuilds it without calling `__init__`. A tree may hold something other than arrays on the way (specifications,
    axis numbers, None), while what a caller constructs has the types that the fields declare.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(instance):
        return [getattr(instance, name) for name in names], None

    def flatten_with_keys(instance):
        return [(jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in names], None

    def unflatten(_, children):
        instance = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(instance, name, child)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
