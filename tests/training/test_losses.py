"""Losses and log-probabilities: TRL's and torch's numbers, in value and gradient, and no NaN anywhere."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES  # noqa: F401 (sets up the simulated devices before JAX starts)

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import sharding
from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.training import losses

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)


def test_orpo_equals_trl():
    """TRL's own `odds_ratio_loss`, called on a bare object that only carries beta."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    chosen, rejected = -RNG.uniform(0.01, 4, (2, 64)).astype(np.float32)
    bare = type("Bare", (), {"beta": 0.3, "accelerator": types.SimpleNamespace(device="cpu")})()
    theirs = trainer.odds_ratio_loss(bare, torch.tensor(chosen), torch.tensor(rejected))[0].numpy()
    loss, parts = losses.orpo(jnp.asarray(chosen), jnp.asarray(rejected), 0.3)
    np.testing.assert_allclose(0.3 * parts["odds_loss"], -theirs, rtol=1e-5)
    np.testing.assert_allclose(loss, -chosen - theirs, rtol=1e-5)


@pytest.mark.parametrize(("kind", "smoothing"), [("simpo", 0.0), ("simpo", 0.2), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_simpo_cpo_and_ipo_equal_trl(kind, smoothing):
    """TRL's `cpo_loss`, of sums or of means; IPO's with a reference is the same of differences."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    chosen, rejected, reference, other = -RNG.uniform(0.01, 9, (4, 64)).astype(np.float32)
    bare = types.SimpleNamespace(beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing, loss_type=kind, alpha=0.0)
    bare.accelerator = types.SimpleNamespace(device="cpu")
    if kind == "ipo":
        theirs = trainer.cpo_loss(bare, torch.tensor(chosen - reference), torch.tensor(rejected - other))[0]
        loss, _ = losses.ipo(chosen, rejected, reference, other, 0.7)
    else:
        theirs = trainer.cpo_loss(bare, torch.tensor(chosen), torch.tensor(rejected))[0]
        loss, parts = losses.simpo(chosen, rejected, 0.7, 0.4, smoothing)
        if kind == "sigmoid":
            loss, parts = losses.cpo(chosen, rejected, chosen / 9, 0.7, 2.0, smoothing)
            loss -= 2.0 * parts["nll"]
    np.testing.assert_allclose(loss, theirs, rtol=1e-5, atol=1e-6)


def test_dpo_equals_torch():
    chosen, rejected, reference, other = -RNG.uniform(0.01, 90, (4, 64)).astype(np.float32)
    margin = torch.tensor(0.2 * ((chosen - reference) - (rejected - other)))
    logsigmoid = torch.nn.functional.logsigmoid
    theirs = -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)
    loss, parts = losses.dpo(chosen, rejected, reference, other, 0.2, 0.1)
    np.testing.assert_allclose(loss, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts["reward_margin"], margin, rtol=1e-5)


def test_orpo_gradient_equals_torch():
    chosen, rejected = -RNG.uniform(0.01, 4, (2, 32))
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    odds = lambda x: x - torch.log1p(-torch.exp(x))
    (-c - 0.25 * torch.nn.functional.logsigmoid(odds(c) - odds(r))).sum().backward()
    ours = jax.grad(lambda c, r: losses.orpo(c, r, 0.25)[0].sum(), argnums=(0, 1))(
        jnp.array(chosen), jnp.array(rejected)
    )
    np.testing.assert_allclose(ours[0], c.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours[1], r.grad, rtol=1e-4, atol=1e-6)


def test_no_nan_at_the_ends():
    """A response of probability one, or next to none, gives finite loss and gradient."""
    extremes = jnp.array([0.0, -1e-12, -1e-9, -1e-6, -0.6931472, -1.0, -50.0, -1e4])
    chosen, rejected = (a.ravel() for a in jnp.meshgrid(extremes, extremes))
    values, gradients = jax.value_and_grad(lambda pair: losses.orpo(*pair, 0.5)[0].sum())((chosen, rejected))
    assert np.isfinite(values) and all(np.isfinite(g).all() for g in gradients)


def test_log1mexp_is_accurate():
    x = -np.logspace(-8, 1.9, 200).astype(np.float32)
    exact = np.log1p(-np.exp(x.astype(np.longdouble)))
    np.testing.assert_allclose(losses.log1mexp(jnp.asarray(x)), exact.astype(np.float64), rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("block", [4, 64])
def test_token_logprobs_equal_torch(softcap, block):
    """Value and gradient, with a ragged last block and with a single one."""
    hidden, table = RNG.normal(size=(3, 7, 16)).astype("f"), RNG.normal(size=(50, 16)).astype("f")
    targets, weights = RNG.integers(0, 50, (3, 7)), RNG.normal(size=(3, 7)).astype("f")
    h = torch.tensor(hidden, requires_grad=True)
    logits = h @ torch.tensor(table).T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(targets)[..., None])[..., 0]
    (theirs * torch.tensor(weights)).sum().backward()

    total = lambda h: (token_logprobs(h, jnp.asarray(targets), jnp.asarray(table), softcap, block) * weights).sum()
    plain = token_logprobs(jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(table), softcap, block)
    np.testing.assert_allclose(plain, theirs.detach(), atol=1e-5)
    value, gradient = jax.value_and_grad(total)(jnp.asarray(hidden))
    np.testing.assert_allclose(value, (theirs.detach() * torch.tensor(weights)).sum(), atol=1e-4)
    np.testing.assert_allclose(gradient, h.grad, atol=1e-5)


@pytest.mark.parametrize(("shape", "batch"), [((8, 1, 1), 8), ((1, 8, 1), 8), ((2, 2, 2), 8), ((1, 8, 1), 3)])
def test_token_logprobs_over_a_mesh(shape, batch):
    """Each device takes its own tokens, also where the batch is not divided: the same numbers, and the loop over blocks
    has no sum of logits over devices."""
    mesh, V = make_mesh(*shape), 512
    hidden, table = RNG.normal(size=(batch, 2, 24, 16)).astype("f"), RNG.normal(size=(V, 16)).astype("f")
    targets = RNG.integers(0, V, (batch, 2, 24)).astype(np.int32)
    total = jax.value_and_grad(lambda *at: token_logprobs(*at, block=16).sum())
    value, gradient = total(hidden, targets, table)
    rows = lambda a: sharding(a.shape, ("batch",) + (None,) * (a.ndim - 1), mesh)
    placed = (
        *(jax.device_put(a, rows(a)) for a in (hidden, targets)),
        jax.device_put(table, sharding((V, 16), ("vocab", "embed"), mesh)),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(total).lower(*placed).compile()
    ours, theirs = compiled(*placed)
    np.testing.assert_allclose(ours, value, rtol=1e-6)
    np.testing.assert_allclose(theirs, gradient, atol=1e-5)
    assert batch < 8 or theirs.sharding.is_equivalent_to(rows(hidden), 4)
    sums = re.findall(r"f32\[([\d,]*)\]\S* all-reduce\(", compiled.as_text())
    assert (sums or batch < 8) and all(dims.split(",")[-1] not in (str(V), str(V // shape[2])) for dims in sums)
