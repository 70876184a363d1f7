"""The mesh: which devices there are and how they are arranged, with axes ('data', 'fsdp', 'tensor')."""

import math

import jax
from jax.sharding import AxisType, Mesh

from roserag_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (all of them by default); one axis may be -1 and takes what the others leave.

    Raises:
      UserError: the product is not the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh: {shown}: sizes must be positive, and at most one may be -1.")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f"config.mesh: {shown} does not make {len(devices)} devices.")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
