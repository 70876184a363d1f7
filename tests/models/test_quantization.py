"""A network with weights in eight bits is the network whose weights are those integers times their scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import branch_logits, cached_logits, random_adapter
from flax import nnx

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig, LoRAParam
from roserag_jax.models.quantization import quantize

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 131, (2, 40))
LORA = LoRAConfig(4, 8.0)


def dequantized(base):
    """The same parameters with float32 weights."""
    flat = dict(nnx.to_flat_state(base))
    for path in [path for path in flat if path[-1] == "weight_scale"]:
        scale, weight = flat.pop(path).get_value(), (*path[:-1], "weight")
        flat[weight] = flat[weight].replace(flat[weight].get_value().astype(jnp.float32) * scale[..., None])
    return nnx.from_flat_state(list(flat.items()))


def quantized_base(opened, mesh):
    return loading.load_base(opened, jnp.dtype("float32"), mesh, quantized=True)


def test_quantize_rounds_to_half_a_step_of_each_channel():
    weight = jnp.asarray(RNG.normal(size=(3, 5, 64)) * 10.0 ** RNG.integers(-3, 3, (3, 5, 1)), jnp.float32)
    weight = weight.at[1, 2].set(0.0)
    integers, scale = quantize(weight)
    assert integers.dtype == jnp.int8 and integers.shape == weight.shape and scale.shape == (3, 5)
    assert (jnp.abs(weight - integers * scale[..., None]) <= 0.501 * scale[..., None]).all()
    np.testing.assert_array_equal(jnp.abs(integers).max(-1), np.where(np.arange(15).reshape(3, 5) == 7, 0, 127))
    assert not jnp.isfinite(quantize(weight.at[0, 0, 0].set(jnp.nan))[1][0, 0])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_quantized_network_equals_its_dequantized_weights(family, tiny_folder, one_device):
    """Prefill, branches and token by token; biases, norms and tables stay as they are."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    base = quantized_base(opened, one_device)
    assert {path[-2] for path, leaf in nnx.to_flat_state(base) if leaf.get_value().dtype == jnp.int8} == {*PROJECTIONS}
    lengths, branches = np.array([30, 21]), RNG.integers(3, 131, (2, 2, 9))
    model = loading.assemble(opened.config, base)
    expected = branch_logits(loading.assemble(opened.config, dequantized(base)), TOKENS, lengths, branches)
    logits = branch_logits(model, TOKENS, lengths, branches)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(cached_logits(model, TOKENS, lengths, branches, opening=5), logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_quantized_gradients_equal_those_of_its_dequantized_weights(tiny_llama, one_device):
    opened, _ = tiny_llama
    base, adapter = quantized_base(opened, one_device), random_adapter(opened.config, LORA, one_device)

    def gradients(base):
        graph, adapter_state, rest = nnx.split(loading.assemble(opened.config, base, LORA, adapter), LoRAParam, ...)

        def loss(adapter):
            model = nnx.merge(graph, adapter, rest)
            cache = model.prefill(jnp.asarray(TOKENS[:, :20]), jnp.array([20, 20]))
            hidden = model.extend(jnp.asarray(TOKENS[:, None, 20:]), cache)
            return jnp.square(model.logits(hidden)).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(adapter_state))

    for found, expected in zip(gradients(base), gradients(dequantized(base)), strict=True):
        assert float(jnp.abs(expected).max()) > 0
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-4)


def test_quantized_weights_are_the_same_on_every_mesh(tiny_llama, one_device):
    """Sharded over a projection's input too: a channel's scale is that of all its pieces."""
    opened, _ = tiny_llama
    one = dict(nnx.to_flat_state(quantized_base(opened, one_device)))
    for axes in ({"fsdp": 4, "data": 2}, {"tensor": 2, "fsdp": 2, "data": 2}):
        for path, leaf in nnx.to_flat_state(quantized_base(opened, make_mesh(**axes))):
            np.testing.assert_array_equal(leaf.get_value(), one[path].get_value())


def test_quantized_weights_that_are_not_finite_are_refused(tiny_llama, one_device, monkeypatch):
    opened, _ = tiny_llama
    read = opened.read
    broken = lambda name, index: np.where("layers.1.mlp.up_proj" in name, np.inf, read(name, index))
    monkeypatch.setattr(opened, "read", broken)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds values that are not finite"):
        quantized_base(opened, one_device)
