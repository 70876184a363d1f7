"""Log-probabilities of given tokens: torch's value and gradient, on one device and over a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import sharding
from roserag_jax.models.logprobs import token_logprobs

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)


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
def test_token_logprobs_on_a_mesh_equal_one_device(shape, batch):
    """Each device takes its own tokens, also where the batch is not divided: the same numbers, and the loop over blocks
    has no sum of logits over devices."""
    mesh, V = make_mesh(*shape), 512
    hidden, table = RNG.normal(size=(batch, 2, 24, 16)).astype("f"), RNG.normal(size=(V, 16)).astype("f")
    targets = RNG.integers(0, V, (batch, 2, 24)).astype(np.int32)
    total = jax.value_and_grad(lambda *at: token_logprobs(*at, block=16).sum())
    value, gradient = total(*map(jnp.asarray, (hidden, targets, table)))
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
