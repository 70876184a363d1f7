"""Collectives counted from compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from roserag_jax.distributed.collectives import Traffic, count_collectives
from roserag_jax.distributed.mesh import make_mesh

FRACTION = 7 / 8  # of an array of eight pieces, what comes from the other seven devices


def in_a_loop(x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(jax.lax.psum(carry, "fsdp")), None), x, None, length=5)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), {"all-reduce": Traffic(1, 2 * FRACTION * 400)}),
        (in_a_loop, {"all-reduce": Traffic(5, 5 * 2 * FRACTION * 400)}),
        (lambda x: jax.lax.all_gather(x, "fsdp"), {"all-gather": Traffic(1, FRACTION * 8 * 400)}),
        (lambda x: jax.lax.psum_scatter(x.reshape(20, 5), "data", tiled=True), {}),  # an axis of one device
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]),
            {"collective-permute": Traffic(1, 400)},
        ),
    ],
    ids=["all-reduce", "in a loop", "all-gather", "one device", "collective-permute"],
)
def test_count_collectives_of_a_program(function, expected):
    """How often, loops multiplied, and the bytes that a device sends."""
    everywhere = PartitionSpec("fsdp")
    program = jax.shard_map(function, mesh=make_mesh(), in_specs=everywhere, out_specs=everywhere, check_vma=False)
    compiled = jax.jit(program).lower(jax.ShapeDtypeStruct((800,), jnp.float32)).compile()
    found = {kind: traffic for kind, traffic in count_collectives(compiled.as_text()).items() if traffic.bytes}
    assert found == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = bf16[8,16]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", ("all-gather", 192)),
        ("%a = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}", ("reduce-scatter", 8)),
        ("%a = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4]", ("all-gather", 48)),
        (
            "%a = s8[64]{0} all-to-all(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}",
            ("all-to-all", 48),
        ),
    ],
)
def test_count_collectives_reads_every_notation(line, expected):
    """Groups of devices as lists, as iota and as axes of a mesh; asynchronous operations; any type."""
    found = count_collectives(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n")
    assert found == {expected[0]: Traffic(1, expected[1])}


# As libtpu writes an all-gather that runs beside two products.
BESIDE = """
%start (x: bf16[8,2]) -> (bf16[8,2], bf16[8,16]) {
  %ag.1 = bf16[8,16]{1,0} all-gather(%x), channel_id=29, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}
  ROOT %call = (bf16[8,2]{1,0}, bf16[8,16]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%product (x: bf16[8,2]) -> bf16[8,16] {
  %ag.2 = bf16[8,16]{1,0} all-gather(%x), channel_id=29, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}
}

%done (x: bf16[8,2]) -> bf16[8,16] {
  %ag.3 = bf16[8,16]{1,0} all-gather(%x), channel_id=29, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}
  ROOT %call = bf16[8,16]{1,0} custom-call(%ag.3), custom_call_target="AsyncCollectiveDone"
}

%layer (p: (s32[], bf16[8,2])) -> (s32[], bf16[8,2]) {
  %f.1 = (bf16[8,2]{1,0}, bf16[8,16]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[8,16]{1,0} fusion(%f.1), kind=kOutput, calls=%product
  %f.3 = bf16[8,16]{1,0} fusion(%f.2), kind=kCustom, calls=%done
  %ag.4 = bf16[8,16]{1,0} all-gather(%y), channel_id=30, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}
}

ENTRY %main (a: bf16[8,2]) -> bf16[8,2] {
  %loop = (s32[], bf16[8,2]{1,0}) while(%init), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"4"}}
}
"""


def test_collective_that_runs_beside_other_work_counts_once():
    """One channel, however many fusions carry it; twice for two channels, in each of four layers."""
    assert count_collectives(BESIDE) == {"all-gather": Traffic(8, 8 * FRACTION * 8 * 16 * 2)}
