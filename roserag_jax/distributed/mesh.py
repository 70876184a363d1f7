"""The mesh: which devices there are and how they are arranged, with axes ('data', 'fsdp', 'tensor')."""

import math
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from roserag_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """Arrange `devices` (all of them by default) in a mesh; one axis may be -1 and takes what the others leave.

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


def matmul_rate(mesh: Mesh, dtype, repeats: int = 3) -> float:
    """Measure FLOPs per second of a matmul on all devices of a mesh at once: the most that a model can reach."""
    size = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192
    everywhere = NamedSharding(mesh, PartitionSpec(AXES))
    a = jnp.ones((mesh.size, size, size), dtype, device=everywhere)
    matmul = jax.jit(lambda a: a @ a, out_shardings=everywhere)
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        start = time.monotonic()
        matmul(a).block_until_ready()
        seconds.append(time.monotonic() - start)
    return 2 * mesh.size * size**3 / min(seconds)
