"""The mesh: which devices there are and how they are arranged, with axes ('data', 'fsdp', 'tensor')."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from roserag_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
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
    return Mesh(arrange_devices(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange_devices(sizes: list[int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices in an array of `sizes` so that neighbors in it are near each other in the network of the chips.

    An axis may take a part of a physical axis, which a slice of 4 x 4 chips needs for most meshes. Where there are
    several slices, which a slower network connects, the first axes (data, then fsdp) are those that cross it.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across, left = [], slices
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = [size // crossing for size, crossing in zip(sizes, across, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def prefers_unstacked_layers(mesh: Mesh) -> bool:
    """Whether decoding on a mesh takes unstacked layers, unrolled, rather than stacked ones, scanned.

    A scan copies each layer's weights and caches before it uses them. On a CPU that takes a third of a decoding step.
    On a GPU only compiling has shown it: for an H100 a step of Gemma-2-2B moves 21.9 GB scanned and 8.8 GB unrolled.
    For a TPU v5e it is 8.07 GB scanned and 8.41 GB unrolled.
    """
    return mesh.devices.flat[0].platform in ("cpu", "gpu")


def matmul_rate(mesh: Mesh, dtype: Any, repeats: int = 3) -> float:
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
