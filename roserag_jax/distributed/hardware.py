"""Accelerators by their published rates, and topologies of them that need not be there.

Rates are those of one chip (one device of JAX): dense bfloat16 FLOPs, HBM bandwidth, and the bandwidth of its links to
other chips in one direction, which is half of what is published for both.
"""

import os
import re
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


# Of a GPU's memory JAX lets a program have this fraction, unless its own variable says otherwise.
_GPU_FRACTION = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))

# By the beginning of `device_kind`, the longer first. Memory is what a program may have.
_CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 15.75 * 2**30, 819 * GB, 197e12, 100 * GB),
    "TPU v4": Chip("TPU v4", 30.75 * 2**30, 1228 * GB, 275e12, 150 * GB),
    "TPU v6 lite": Chip("TPU v6e", 31.25 * 2**30, 1640 * GB, 918e12, 224 * GB),
    "TPU v5": Chip("TPU v5p", 95.74 * 2**30, 2765 * GB, 459e12, 300 * GB),
    "NVIDIA A100-SXM4-80GB": Chip("A100", _GPU_FRACTION * 85.1e9, 2039 * GB, 312e12, 300 * GB),
    "NVIDIA H100 80GB HBM3": Chip("H100", _GPU_FRACTION * 84.94e9, 3352 * GB, 989e12, 450 * GB),
    "NVIDIA H200": Chip("H200", _GPU_FRACTION * 151.4e9, 4800 * GB, 989e12, 450 * GB),
}


class _GPU(NamedTuple):
    """What XLA's compiler asks of a GPU, beside what is the same in all of them."""

    device_kind: str
    capability: int
    cores: int
    units_per_core: int
    shared_memory: int  # bytes, of a core
    cache: int  # bytes, of the second level
    clock: float  # GHz
    memory: int  # bytes of the card
    bandwidth: int


_GPUS = {
    "a100": _GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 41943040, 1.41, 85100068864, 2039040000000),
    "h100": _GPU("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 52428800, 1.98, 84942979072, 3352320000000),
    "h200": _GPU("NVIDIA H200 141GB HBM3e", 9, 132, 128, 233472, 52428800, 1.98, 151397597184, 4800000000000),
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
    """The devices of a topology such as 'v5e:2x4' or 'gpu:h100x8', to compile for; they need not be there.

    Args:
      slices: of TPUs; of GPUs, machines.

    Raises:
      UserError: the compiler for them (libtpu, or the CUDA plug-in) is not installed, or does not know the topology.
    """
    return _gpus(name, slices) if name.startswith("gpu") else _tpus(name, slices)


def _tpus(name: str, slices: int) -> list:
    from jax.experimental import topologies

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
    if name in ("v5e:2x4", "v6e:2x4"):  # one host, where larger ones have hosts of four chips
        options["chips_per_host_bounds"] = [2, 4, 1]
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # libtpu raises many kinds
        why = f"not a topology that libtpu knows, such as v5e:2x4 or v5p:2x2x2: {first_line(error)}"
        if find_spec("libtpu") is None:
            why = "libtpu is needed (pip install 'roserag_jax[plan]')."
        raise UserError(f"--topology={name}: {why}") from error


def _gpus(name: str, machines: int) -> list:
    from jax.experimental import topologies

    found = re.fullmatch(r"gpu:(\w+?)x(\d+)", name)
    if not found or (gpu := _GPUS.get(found.group(1))) is None or not int(found.group(2)):
        raise UserError(f"--topology={name}: not gpu:KINDxCOUNT with one of the kinds {', '.join(_GPUS)}.")
    try:
        shape = f"{machines}x1x{found.group(2)}"
        return list(topologies.get_topology_desc("", "cuda", target_config=_target(gpu), topology=shape).devices)
    except NotImplementedError as error:
        version = jax.__version__
        why = f"the CUDA plug-in is needed (pip install 'jax-cuda12-plugin[with-cuda]=={version}')."
        raise UserError(f"--topology={name}: {why}") from error


def _target(gpu: _GPU) -> str:
    """A GPU as XLA's compiler has it described, a protocol buffer as text."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 65536,
        "registers_per_core_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
        "shared_memory_per_core": gpu.shared_memory,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units_per_core,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "memory_bandwidth": gpu.bandwidth,
    }
    fields = " ".join(f"{key}: {value}" for key, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {gpu.capability} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 } '
        f'device_description_str: "{gpu.device_kind}"'
    )
