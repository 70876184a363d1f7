"""The network is the one that was downloaded: transformers and peft are the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, branch_logits, cached_logits, hf_logits
from flax import nnx

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading, model_files

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
    ours = branch_logits(model, TOKENS, lengths, branches)
    for b in range(2):
        for n in range(2):
            theirs = hf_logits(reference, [*TOKENS[b, : lengths[b]], *branches[b, n]])[lengths[b] :]
            np.testing.assert_allclose(ours[b, n], theirs, atol=1e-4, rtol=0)
    stepped = cached_logits(model, TOKENS, lengths, branches, opening=5)
    np.testing.assert_allclose(stepped, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family, tiny_folder, one_device):
    """After every layer, and far beyond the window and the original length of RoPE's scaling."""
    import dataclasses

    folder, reference = tiny_folder(family)
    opened = model_files.open_model(str(folder))
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    tokens = RNG.integers(3, 131, 400)
    with torch.no_grad():
        theirs = reference.model(torch.tensor(tokens)[None], output_hidden_states=True).hidden_states
        theirs = [reference.model.norm(hidden)[0, 380:].numpy() for hidden in theirs[1:-1]] + [theirs[-1][0, 380:]]
    for count in range(1, 4):
        config = dataclasses.replace(
            opened.config, num_layers=count, sliding_layers=opened.config.sliding_layers[:count]
        )
        cut = lambda path, v, count=count: (path, v.replace(v.get_value()[:count] if path[0] == "layers" else v[...]))
        first = nnx.from_flat_state([cut(path, v) for path, v in nnx.to_flat_state(base)])
        model = loading.assemble(config, first)
        ours = model.extend(tokens[None, None, 380:], model.prefill(tokens[None, :380], np.array([380])))[0, 0]
        np.testing.assert_allclose(ours, theirs[count - 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_shared_beginning_changes_nothing(family, tiny_folder, one_device):
    """Prompts read behind their common beginning leave the keys and values that they leave when read whole."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    prompts = TOKENS.copy()
    prompts[1, :17] = prompts[0, :17]
    whole = model.prefill(prompts, np.array([40, 29]))
    shared = model.prefill(prompts[:1, :17], np.array([17]))
    behind = model.prefill(prompts[:, 17:], np.array([23, 12]), shared)
    assert behind.lengths.tolist() == [40, 29]
    np.testing.assert_allclose(behind.k, whole.k, atol=1e-5)
    np.testing.assert_allclose(behind.v, whole.v, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sharded_equals_one_device(family, shape, tiny_folder, one_device):
    """Eight devices, also with more tensor devices than key/value heads."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    prompts, lengths, branches = np.tile(TOKENS, (4, 1)), np.arange(20, 28), RNG.integers(3, 131, (8, 2, 7))
    results = []
    for mesh in (one_device, make_mesh(*shape)):
        model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), mesh))
        with jax.set_mesh(mesh):
            results.append(branch_logits(model, prompts, lengths, branches))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4, rtol=0)


def test_parameters_are_spread(tiny_llama):
    opened, _ = tiny_llama
    base = loading.load_base(opened, jnp.dtype("float32"), make_mesh(1, 4, 2))
    weight = dict(nnx.to_flat_state(base))[("layers", "gate_proj", "weight")].get_value()
    assert weight.shape == (3, 80, 48) and weight.addressable_shards[0].data.shape == (3, 40, 12)
