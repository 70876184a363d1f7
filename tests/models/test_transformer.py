"""The network computes what transformers computes, also behind caches, prefixes and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, branch_logits, cached_logits, hf_logits
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from roserag_jax.distributed.collectives import count_collectives
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import state_shardings
from roserag_jax.hub import loading, model_files
from roserag_jax.models.cache import unstack
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig
from roserag_jax.models.transformer import Transformer

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 131, (2, 40))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tiny_folder, one_device):
    """Two prompts of unequal length, two branches each, at once and token by token."""
    folder, reference = tiny_folder(family)
    opened = model_files.open_model(str(folder))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    lengths = np.array([30, 21])
    branches = RNG.integers(3, 131, (2, 2, 9))
    logits = branch_logits(model, TOKENS, lengths, branches)
    for b in range(2):
        for n in range(2):
            expected = hf_logits(reference, [*TOKENS[b, : lengths[b]], *branches[b, n]])[lengths[b] :]
            np.testing.assert_allclose(logits[b, n], expected, atol=1e-4, rtol=0)
    stepped = cached_logits(model, TOKENS, lengths, branches, opening=5)
    np.testing.assert_allclose(stepped, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family, tiny_folder, one_device):
    """After every layer, and far beyond the window and the original length of RoPE's scaling."""
    folder, reference = tiny_folder(family)
    opened = model_files.open_model(str(folder))
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    tokens = jnp.asarray(RNG.integers(3, 131, 400))
    with torch.no_grad():
        expected = reference.model(torch.tensor(np.asarray(tokens))[None], output_hidden_states=True).hidden_states
        expected = [reference.model.norm(hidden)[0, 380:].numpy() for hidden in expected[1:-1]] + [
            expected[-1][0, 380:]
        ]
    for count in range(1, 4):
        config = dataclasses.replace(
            opened.config, num_layers=count, sliding_layers=opened.config.sliding_layers[:count]
        )
        cut = lambda path, v, count=count: (path, v.replace(v.get_value()[:count] if path[0] == "layers" else v[...]))
        first = nnx.from_flat_state([cut(path, v) for path, v in nnx.to_flat_state(base)])
        model = loading.assemble(config, first)
        hidden = model.extend(tokens[None, None, 380:], model.prefill(tokens[None, :380], jnp.array([380])))[0, 0]
        np.testing.assert_allclose(hidden, expected[count - 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prefill_behind_a_shared_prefix(family, tiny_folder, one_device):
    """Prompts behind their shared prefix have the keys and values that they have when prefilled whole."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    prompts = jnp.asarray(TOKENS).at[1, :17].set(TOKENS[0, :17])
    whole = model.prefill(prompts, jnp.array([40, 29]))
    shared = model.prefill(prompts[:1, :17], jnp.array([17]))
    behind = model.prefill(prompts[:, 17:], jnp.array([23, 12]), shared)
    assert behind.lengths.tolist() == [40, 29]
    np.testing.assert_allclose(behind.k, whole.k, atol=1e-5)
    np.testing.assert_allclose(behind.v, whole.v, atol=1e-5)


def test_prompts_and_branches_together_are_what_they_are_apart(tiny_folder, one_device):
    """Behind a shared prefix, with padding and a sliding window: the hidden states of branches, prompts and prefix."""
    opened = model_files.open_model(str(tiny_folder("gemma2")[0]))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=1)
    def run(state, together):
        prompt, branches = TOKENS[:, 17:33], TOKENS[:, 33:39].reshape(2, 2, 3)
        of_pairs = jnp.asarray(prompt), jnp.array([16, 11]), jnp.asarray(branches), jnp.asarray(TOKENS[0, :17])
        return nnx.merge(graph, state).prefill_and_extend(*of_pairs, return_hidden=True, together=together)

    for one, other in zip(run(state, False), run(state, True), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_extend_unstacked_equals_extend_cached(family, tiny_folder, one_device):
    """The same hidden states and caches, layer by layer, with padding inside the branches."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    tokens = jnp.asarray(TOKENS)
    prefix = model.prefill(tokens[:, :20], jnp.array([20, 13]))
    suffix = model.empty_suffix_cache(2, 2, 16)
    branches, real = tokens[:, 20:36].reshape(2, 2, 8), jnp.ones((2, 2, 8), bool).at[1, 0, 5:].set(False)
    both = lambda cache: dataclasses.replace(cache, k=unstack(cache.k), v=unstack(cache.v))
    layers = unstack(nnx.state(model.layers))
    hidden, stacked = model.extend_cached(branches, real, prefix, suffix)
    other, unstacked = model.extend_unstacked(layers, branches, real, both(prefix), both(suffix))
    np.testing.assert_allclose(other, hidden, atol=1e-5, rtol=0)
    for a, b in zip(unstacked.k + unstacked.v, [*stacked.k, *stacked.v], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert int(unstacked.write_position) == int(stacked.write_position) == 8
    np.testing.assert_array_equal(unstacked.used, stacked.used)
    np.testing.assert_array_equal(unstacked.positions, stacked.positions)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_on_a_mesh_equal_one_device(family, shape, tiny_folder, one_device):
    """Eight devices, also with more tensor devices than key/value heads."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    prompts, lengths, branches = np.tile(TOKENS, (4, 1)), np.arange(20, 28), RNG.integers(3, 131, (8, 2, 7))
    results = []
    for mesh in (one_device, make_mesh(*shape)):
        model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), mesh))
        with jax.set_mesh(mesh):
            results.append(branch_logits(model, prompts, lengths, branches))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shape"),
    [(8, 4, (1, 1, 8)), pytest.param(12, 2, (2, 1, 4), marks=pytest.mark.slow), (12, 2, (1, 1, 8))],
    ids=["Gemma over eight", "Qwen over four", "Qwen over eight, which divide neither heads"],
)
def test_decoding_split_by_tensor_sends_activations_only(heads, kv_heads, shape, one_device):
    """Prompts and three greedy steps, as on one device; counted in the compiled program and by hand.

    Of each token a device sends, in a ring over `tensor`: the sums of the embedding and in each layer of the output
    projections of attention and MLP; keys and values where a device has no whole head of them, queries likewise; and
    the likeliest token of its part of the vocabulary.
    """
    L, D, F, V, h, itemsize = 2, 64, 256, 1024, 16, 4
    config = ModelConfig("llama", V, D, L, heads, kv_heads, h, F, 1e-5, 1e4)
    B, N, P, steps = 8, 2, 16, 3
    rng = np.random.default_rng(0)
    prompts, lengths, first = rng.integers(0, V, (B, P)), np.arange(9, 9 + B), rng.integers(0, V, (B, N, 1))

    def run(state, prompts, lengths, last):
        model = nnx.merge(graph, state)
        cache = model.prefill(prompts, lengths)

        def advance(_, carry):
            last, suffix, _ = carry
            hidden, suffix = model.extend_cached(last, jnp.ones_like(last, bool), cache, suffix)
            logits = model.logits(hidden)
            return logits.argmax(-1), suffix, logits[:, :, 0]

        carry = last, model.empty_suffix_cache(B, N, 16), jnp.zeros((B, N, V))
        return jax.lax.fori_loop(0, steps, advance, carry)

    graph, state = nnx.split(Transformer(config, LoRAConfig(), jnp.float32, nnx.Rngs(0)))
    results = []
    for mesh in (one_device, make_mesh(*shape)):
        where = state_shardings(state, mesh)
        placed = jax.tree.map(lambda a, place: jax.device_put(a, place), state, where)
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        with jax.set_mesh(mesh):
            arguments = placed, *(jax.device_put(jnp.asarray(a), rows) for a in (prompts, lengths, first))
            compiled = jax.jit(run).lower(*arguments).compile()
            results.append(compiled(*arguments))
    (tokens, _, logits), (other_tokens, suffix, other_logits) = results
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_allclose(logits, other_logits, atol=1e-5, rtol=0)

    X, t = shape[0] * shape[1], shape[2]
    ring = (t - 1) / t
    decoded = B * N * steps / X
    gathered = (2 * kv_heads * (kv_heads % t > 0) + heads * (heads % t > 0)) * h
    of_token = ring * itemsize * (2 * D * (2 * L + 1) + L * gathered)
    likeliest = ring * t * 2 * itemsize
    by_hand = of_token * (B * P / X + decoded) + likeliest * decoded
    traffic = count_collectives(compiled.as_text())
    assert sum(each.bytes for each in traffic.values()) <= by_hand
    # A device holds the key/value heads of its own query heads, or where it has no whole one, all of them.
    held = kv_heads if heads % t else max(kv_heads // t, 1)
    assert suffix.k.addressable_shards[0].data.shape == (L, B // X, held, N, h, 16)
