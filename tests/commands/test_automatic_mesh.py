"""The meshes of a run: those that it is told, those that suit, and weights that move from one to the other."""

import types

import jax
import numpy as np
import pytest
from conftest import LORA

from roserag_jax import automatic_mesh, options
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.hub import loading
from roserag_jax.session import Session

REPLICATED = {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh", "decoding", "training"),
    [
        ({}, REPLICATED, REPLICATED),  # the memory of a CPU is not known
        ({"memory_gb": 1.0}, REPLICATED, REPLICATED),
        ({"memory_gb": 1e-4}, {"data": 1, "fsdp": 1, "tensor": 8}, {"data": 1, "fsdp": 8, "tensor": 1}),
        ({"fsdp": 4}, {"data": 2, "fsdp": 4, "tensor": 1}, {"data": 2, "fsdp": 4, "tensor": 1}),
        ({"fsdp": -1, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}),
        ({"data": 2, "memory_gb": 1e-4}, {"data": 2, "fsdp": 4, "tensor": 1}, {"data": 2, "fsdp": 4, "tensor": 1}),
    ],
    ids=str,
)
def test_choose_meshes(mesh, decoding, training, tiny_llama, monkeypatch):
    """Weights are replicated where they fit, and numbers of the user's always hold; the reason is one line."""
    monkeypatch.setattr(automatic_mesh, "make_mesh", make_mesh)
    config = options.defaults()
    config.mesh.update(mesh)
    found = automatic_mesh.choose_meshes(config, tiny_llama[0].config, LORA, jax.devices())
    assert (dict(found.decoding.shape), dict(found.training.shape)) == (decoding, training)
    assert found.why.startswith("mesh for decoding data=") and "\n" not in found.why


@pytest.mark.parametrize(
    ("mesh", "decoding"),
    [
        ({"data": 8, "fsdp": 1}, (4, 1, 1)),  # what is left for `tensor` is one device
        ({"data": 4}, (1, 4, 1)),
        ({"tensor": 2}, (2, 1, 2)),
        ({}, (4, 1, 1)),
    ],
    ids=str,
)
def test_choose_meshes_of_several_processes(mesh, decoding, tiny_llama, monkeypatch):
    """Each of two decodes on its own four devices, split as training is."""
    real = lambda devices, **sizes: make_mesh(**sizes, devices=jax.devices()[: len(devices)])
    monkeypatch.setattr(automatic_mesh, "make_mesh", real)
    config = options.defaults()
    config.mesh.update(mesh)
    of = lambda i: types.SimpleNamespace(process_index=i // 4, platform="cpu", device_kind="cpu")
    found = automatic_mesh.choose_meshes(config, tiny_llama[0].config, LORA, [of(i) for i in range(8)])
    assert found.decoding.devices.shape == decoding and found.training.size == 8


def test_choose_meshes_refuses_numbers_that_do_not_fit(tiny_llama, monkeypatch):
    monkeypatch.setattr(automatic_mesh, "make_mesh", make_mesh)
    config = options.defaults()
    config.mesh.tensor = 3
    with pytest.raises(UserError, match="config.mesh: data=-1 x fsdp=1 x tensor=3 does not make 8 devices"):
        automatic_mesh.choose_meshes(config, tiny_llama[0].config, LORA, jax.devices())


@pytest.mark.parametrize(
    ("pairs", "batch", "expected"),
    [(100, 24, 1), (12, 24, 1), (11, 24, 2), (4, 24, 3), (3, 24, 4), (0, 24, 12), (1, 7, 7), (None, 24, 1)],
)
def test_accumulation_from_the_memory(pairs, batch, expected, tiny_llama):
    """As few microbatches as fit, of equal size, and shared by all devices where the batch can be."""
    model, mesh, config = tiny_llama[0].config, make_mesh(2, 1, 1, devices=jax.devices()[:2]), options.defaults()
    config.dtype, config.train.batch, config.train.accumulate = "float32", batch, 0
    tokens = config.prompt.max_tokens + 2 * config.train.max_response
    if pairs is not None:  # of a device
        sizes = {"pairs": pairs, "tokens": tokens, "remat": config.train.remat}
        needs = automatic_mesh.training_needs(model, LORA, 4, **sizes)
        config.mesh.memory_gb = 1.0001 * needs / automatic_mesh._HEADROOM / 1e9
    assert automatic_mesh.accumulation(config, model, LORA, mesh) == expected
    config.train.accumulate = 2
    assert automatic_mesh.accumulation(config, model, LORA, mesh) == 2


def test_weights_are_loaded_once_and_move_between_meshes(config_of, monkeypatch, capsys):
    """Decoding in tensor, training in fsdp, and decoding again: the same scores, the same weights to the bit."""
    monkeypatch.setattr(automatic_mesh, "make_mesh", make_mesh)
    loads, load = [], loading.load_base
    monkeypatch.setattr(loading, "load_base", lambda *given: loads.append(given) or load(*given))
    run, alone = Session(config_of(**{"mesh.memory_gb": 1e-4})), Session(config_of(**{"mesh.data": 8}))
    prompt, response = [list(b"Which one?")], [[list(b"So. Answer: b")]]
    scores = lambda session: session.engine().score(session.engine().prefill(prompt), prompt, response, 16)
    expected = scores(alone)
    np.testing.assert_allclose(scores(run), expected, atol=1e-4)
    weights = lambda session: jax.tree.leaves(jax.tree.map(np.asarray, session.base))
    jax.tree.map(np.testing.assert_array_equal, weights(run), weights(alone))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(run.base)} == {run.mesh}
    np.testing.assert_allclose(scores(run), expected, atol=1e-4)
    assert len(loads) == 2  # one of each session
    assert "mesh for decoding data=1 fsdp=1 tensor=8, for training data=1 fsdp=8 tensor=1: " in capsys.readouterr().out
