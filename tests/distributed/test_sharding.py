"""Sharding rules: what a dimension is sharded over, and what is replicated."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import constrain, devices, held_kv_heads, partition_spec, state_shardings
from roserag_jax.hub import loading
from roserag_jax.models.lora import LoRAConfig, LoRAParam


def test_partition_spec_replicates_what_does_not_divide():
    mesh = make_mesh(2, 2, 2)
    assert devices("batch", mesh) == 4 and devices("heads", mesh) == 2 and devices(None, mesh) == 1
    assert partition_spec((8, 6, 5), ("batch", "heads", None), mesh) == P(("data", "fsdp"), ("tensor",), None)
    assert partition_spec((6, 3), ("batch", "heads"), mesh) == P(None, None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "split", "held"),
    [
        (8, 4, 1, 4),
        (8, 4, 4, 4),
        (8, 4, 8, 8),
        (32, 8, 4, 8),
        (12, 2, 4, 4),
        (24, 6, 8, 24),
        (12, 2, 8, 2),
        (8, 1, 2, 2),
    ],
)
def test_key_value_heads_are_held_as_often_as_devices_share_them(heads, kv_heads, split, held):
    assert held_kv_heads(heads, kv_heads, split) == held


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    mesh = make_mesh(8, 1, 1)
    with jax.set_mesh(mesh):
        sharded = jax.jit(lambda x: constrain(x, "batch", None))(x)
    assert sharded.addressable_shards[0].data.shape == (1, 4)


def test_load_base_shards_parameters(tiny_llama):
    opened, _ = tiny_llama
    base = loading.load_base(opened, jnp.dtype("float32"), make_mesh(1, 4, 2))
    weight = dict(nnx.to_flat_state(base))[("layers", "gate_proj", "weight")].get_value()
    assert weight.shape == (3, 80, 48) and weight.addressable_shards[0].data.shape == (3, 40, 12)


def test_state_shardings_replicate_what_declares_no_axes(tiny_llama):
    opened, _ = tiny_llama
    mesh = make_mesh(1, 4, 2)
    adapter = nnx.state(loading.abstract_model(opened.config, LoRAConfig(4), jnp.float32), LoRAParam)
    shardings = state_shardings({"adapter": adapter, "count": jnp.zeros((8, 8))}, mesh)
    assert shardings["count"].spec == P()
    specs = {path: v.get_value().spec for path, v in nnx.to_flat_state(shardings["adapter"])}
    assert specs[("layers", "gate_proj", "lora_a")] == P(None, ("fsdp",), None)
    assert specs[("layers", "gate_proj", "lora_b")] == P(None, None, ("tensor",))
