"""Meshes: sizes that fit the devices, and real topologies where their compiler is installed."""

import math
import types
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from roserag_jax.distributed.mesh import arrange_devices, make_mesh
from roserag_jax.errors import UserError


def test_make_mesh_fills_the_free_axis():
    assert make_mesh().devices.shape == (1, 8, 1)
    assert make_mesh(-1, 2, 2).devices.shape == (2, 2, 2)
    assert make_mesh(1, -1, 1, jax.devices()[:3]).devices.shape == (1, 3, 1)


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1), (1, 16, 1)], ids=str)
def test_make_mesh_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match="config.mesh: data="):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("sizes", "slices", "across"), [((4, 2, 1), 4, 4), ((1, 8, 1), 2, 2), ((2, 4, 1), 4, 2)], ids=str
)
def test_arrange_devices_crosses_slices_on_the_first_axes(sizes, slices, across):
    """Devices of one slice stay together behind the part of each axis that crosses slices."""
    kind = dict(platform="cpu", device_kind="cpu", process_index=0)
    devices = [types.SimpleNamespace(id=i, slice_index=i * slices // 8, **kind) for i in range(8)]
    arranged = arrange_devices(list(sizes), devices)
    assert arranged.shape == sizes and sorted(device.id for device in arranged.flat) == list(range(8))
    number = np.vectorize(lambda device: device.slice_index)(arranged)
    first = next(axis for axis, size in enumerate(sizes) if size > 1)
    blocks = np.moveaxis(number, first, 0).reshape(across, -1)
    assert len(np.unique(number)) == slices and all(len(set(block)) == slices // across for block in blocks)


@pytest.mark.parametrize(
    ("topology", "slices", "sizes"),
    [
        ("v5e:2x4", 1, (1, 8, 1)),
        ("v6e:4x4", 1, (2, 8, 1)),
        ("v6e:4x4", 1, (2, 2, 4)),
        ("v5p:4x4x4", 1, (2, 32, 1)),
        ("v5p:4x4x4", 1, (2, 2, 16)),
        ("v6e:4x4", 2, (1, 32, 1)),
        ("v6e:4x4", 2, (4, 2, 4)),
    ],
    ids=str,
)
def test_make_mesh_on_tpu_slices(topology, slices, sizes):
    """Chips of one or two slices in any mesh, also where an axis is a part of a physical one."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu, which knows the topologies, is not installed")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu", num_slices=slices).devices
    mesh = make_mesh(*sizes, devices=devices)
    assert mesh.devices.shape == sizes and len(set(mesh.devices.flat)) == math.prod(sizes)
