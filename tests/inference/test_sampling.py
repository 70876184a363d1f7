"""Sampling: tokens follow the distribution that transformers' warpers leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax.distributed.collectives import count_collectives
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import sharding
from roserag_jax.inference.sampling import SamplingParams, _bisect, sample_tokens

pytest.importorskip("torch")


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.5),
        SamplingParams(1.0, top_p=0.6),
        SamplingParams(0.7, top_p=0.8),
        SamplingParams(1.0, top_k=12),
        SamplingParams(1.5, min_p=0.1),
        SamplingParams(1.2, 0.9, 40, 0.02),
    ],
    ids=str,
)
def test_sample_tokens_follow_the_distribution_of_transformers(params):
    """A chi-square test of 20,000 draws over 600 tokens against what transformers' warpers leave of them."""
    import torch
    from transformers.generation import logits_process as warpers

    logits = np.random.default_rng(0).normal(size=600).astype("f") * 2
    chain = [warpers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain.append(warpers.TopKLogitsWarper(params.top_k))
    chain += [warpers.TopPLogitsWarper(params.top_p), warpers.MinPLogitsWarper(params.min_p)]
    scores = torch.tensor(logits[None], dtype=torch.float64)
    for warper in chain:
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()

    n = 20_000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(n))
    # Every other row is drawn otherwise: sampling parameters are each row's own.
    odd = jnp.arange(2 * n) % 2 == 1
    rows = jax.tree.map(lambda mine, other: jnp.where(odd, mine, other), params, SamplingParams(0.3, 0.5))
    logits = jnp.broadcast_to(jnp.asarray(logits), (2 * n, 600))
    drawn = np.asarray(jax.jit(sample_tokens)(logits, jnp.repeat(keys, 2), rows))[1::2]
    counts = np.bincount(drawn, minlength=600)
    assert counts[expected == 0].sum() == 0
    frequent = expected * n >= 5  # the others together
    observed = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum()) * n
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_sampling_split_by_vocabulary_gathers_no_logits():
    """On eight devices, each with 2,374 tokens (no multiple of a block): the same tokens, and sent for each row are
    some sums of each device and the block of 256 that the token is drawn from, but not 18,992 logits."""
    R, V = 32, 18992
    logits = jax.random.normal(jax.random.key(0), (R, V)) * 3
    keys = jax.random.split(jax.random.key(1), R)
    params = jax.tree.map(lambda value: jnp.full(R, value), SamplingParams(1.0, 0.9, 500, 1e-4))
    expected = jax.jit(sample_tokens)(logits, keys, params)
    mesh = make_mesh(1, 1, 8)
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, sharding((R, V), ("batch", "vocab"), mesh))
        program = jax.jit(sample_tokens).lower(logits, keys, params).compile()
    np.testing.assert_array_equal(program(logits, keys, params), expected)
    a_block = 2 * 7 / 8 * 256 * 4  # summed over the devices, of which one has it
    sent = sum(kind.bytes for kind in count_collectives(program.as_text()).values()) / R
    assert a_block <= sent < 2 * a_block < 7 / 8 * V * 4


def test_thresholds_in_fewer_passes_are_the_same():
    """What an accelerator takes in eleven passes and a CPU in 32: the same thresholds to the bit, ties among them."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 5000)).astype("f") * 3
    logits[::3] = logits[::3].round(1)
    logits[1], logits[2, 1:] = 0.5, -1e9
    weights = jax.nn.softmax(jnp.asarray(logits), -1)
    wanted = jnp.asarray(rng.uniform(0.01, 1, 40).astype("f"))
    for of_each, total in ((weights, wanted), (jnp.ones_like(weights), jnp.arange(1, 41))):
        one, three = (jax.jit(_bisect, static_argnums=3)(jnp.asarray(logits), of_each, total, n) for n in (1, 3))
        np.testing.assert_array_equal(one, three)
        kept = np.where(logits >= np.asarray(one)[:, None], of_each, 0).sum(-1)
        assert (kept >= np.asarray(total) - 1e-4).all()
