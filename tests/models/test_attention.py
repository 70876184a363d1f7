"""The two attentions equal one plain softmax over everything that a query may attend to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax.models.attention import branch_attention, prompt_attention

RNG = np.random.default_rng(0)
B, N, C, P, S, H, K, h = 2, 3, 5, 37, 4, 6, 2, 8


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def plain_attention(q, k, v, mask, softcap):
    """`q` [T H h] over `k` and `v` [keys K h] where `mask` [T keys]: one query, one head at a time."""
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = jnp.einsum("thd,shd->hts", q, k)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), v)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("block", [2, 8, 256])  # 19, 5 and 1 of them: in loops, unrolled, alone
def test_prompt_attention_equals_plain_attention(block, window, softcap):
    """In one block and in several, behind a shared prefix, with and without a window."""
    q, k, v = normal(B, P, H, h), normal(B, C + P, K, h), normal(B, C + P, K, h)
    query, key = C + np.arange(P)[:, None], np.arange(C + P)[None]
    mask = (key <= query) & (query - key < (window or 1000))
    out = prompt_attention(
        q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), window=window, softcap=softcap, block=block
    )
    for b in range(B):
        np.testing.assert_allclose(out[b], plain_attention(q[b], k[b], v[b], mask, softcap), atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_branch_attention_equals_plain_attention(softcap):
    """One softmax over prompt and branch, whatever each of them hides."""
    M = S
    q, k, v = normal(B, N, S, H, h), normal(B, P, K, h), normal(B, P, K, h)
    suffix_k, suffix_v = normal(B, N, M, K, h), normal(B, N, M, K, h)
    prefix_mask = jnp.asarray(RNG.random((B, N, S, P)) < 0.6)
    suffix_mask = jnp.asarray(RNG.random((B, N, S, M)) < 0.6).at[..., 0].set(True)
    out = branch_attention(
        q,
        k.transpose(0, 2, 3, 1),
        v.transpose(0, 2, 1, 3),
        suffix_k.transpose(0, 3, 1, 4, 2),
        suffix_v.transpose(0, 3, 1, 2, 4),
        prefix_mask=prefix_mask,
        suffix_mask=suffix_mask,
        softcap=softcap,
    )
    for b, n in np.ndindex(B, N):
        keys, values = jnp.concatenate([k[b], suffix_k[b, n]]), jnp.concatenate([v[b], suffix_v[b, n]])
        mask = jnp.concatenate([prefix_mask[b, n], suffix_mask[b, n]], axis=-1)
        np.testing.assert_allclose(out[b, n], plain_attention(q[b, n], keys, values, mask, softcap), atol=1e-5)


def test_prompt_attention_in_loops_has_the_gradient_of_one_block():
    q, k, v = normal(B, P, H, h), normal(B, K, h, C + P), normal(B, K, C + P, h)
    total = lambda block, *qkv: (prompt_attention(*qkv, window=7, softcap=2.0, block=block) ** 2).sum()
    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3)), static_argnums=0)
    for looped, alone in zip(gradient(2, q, k, v), gradient(256, q, k, v), strict=True):
        np.testing.assert_allclose(looped, alone, atol=1e-5)
