"""Accelerators by their published rates, and topologies of them that need not be there.

Rates are those of one chip (one device of JAX): dense bfloat16 FLOPs, HBM bandwidth, and the bandwidth of its links to
other chips in one direction, which is half of what is published for both.
"""

import os
from importlib.util import find_spec
from typing import NamedTuple

import jax

from roserag_jax.errors import UserError, first_line

GB = 1e9


class Chip(NamedTuple):
    """One device: bytes of memory, bytes per second of it, FLOPs per second, bytes per second sent to other chips."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    links: float


# By the beginning of `device_kind`, the longer first. TPU memory is what XLA lets a program have.
_CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 15.75 * 2**30, 819 * GB, 197e12, 100 * GB),
    "TPU v4": Chip("TPU v4", 30.75 * 2**30, 1228 * GB, 275e12, 150 * GB),
    "TPU v6 lite": Chip("TPU v6e", 31.25 * 2**30, 1640 * GB, 918e12, 224 * GB),
    "TPU v5": Chip("TPU v5p", 95.74 * 2**30, 2765 * GB, 459e12, 300 * GB),
}


def chip_of(device) -> Chip | None:
    """The chip that a device is, or None if it is not known."""
    return next((chip for kind, chip in _CHIPS.items() if device.device_kind.startswith(kind)), None)


def memory_of(device) -> float | None:
    """Bytes of memory that a program may have on a device, as the backend says or as published; None on a CPU."""
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # a device that is not there
        stats = None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = chip_of(device)
    return chip.memory if chip else None


def topology(name: str, slices: int = 1) -> list:
    """The devices of a TPU topology such as 'v5e:2x4', to compile for; they need not be there.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    if name.startswith("gpu"):
        raise UserError(f"--topology={name}: only TPUs can be compiled for without being there.")
    # libtpu would look for the machine that it is on, and lets one process at a time use its chips.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    options = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4"):  # both cores of a chip are one device, as on the machines themselves
        options["chip_config_name"] = "megacore"
    if name.endswith((":1x1", ":1x1x1")):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # libtpu raises many kinds
        why = f"not a topology that libtpu knows, such as v5e:2x4 or v5p:2x2x2: {first_line(error)}"
        if find_spec("libtpu") is None:
            why = "libtpu is needed (pip install 'roserag_jax[plan]')."
        raise UserError(f"--topology={name}: {why}") from error
