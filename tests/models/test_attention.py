"""The two attentions equal one plain softmax over everything that a query may attend to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax.distributed import hardware
from roserag_jax.distributed.collectives import count_collectives
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import sharding
from roserag_jax.models import attention
from roserag_jax.models.attention import blocked_attention, branch_attention, prompt_attention, splash_attention

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
def test_blocked_attention_equals_plain_attention(block, window, softcap):
    """In one block and in several, behind a shared prefix, with and without a window."""
    q, k, v = normal(B, P, H, h), normal(B, C + P, K, h), normal(B, C + P, K, h)
    query, key = C + np.arange(P)[:, None], np.arange(C + P)[None]
    mask = (key <= query) & (query - key < (window or 1000))
    out = blocked_attention(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), window, softcap=softcap, block=block)
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


@pytest.mark.parametrize("window", [None, 7])
def test_attention_of_one_head_after_another_equals_all_together(window, monkeypatch):
    """What a CPU does where scores are many: outputs and gradients of both attentions, each head with its own masks."""
    q, k, v = normal(B, P, H, h), normal(B, K, h, C + P), normal(B, K, C + P, h)
    branches = (
        normal(B, N, S, H, h),
        normal(B, K, h, P),
        normal(B, K, P, h),
        normal(B, K, N, h, S),
        normal(B, K, N, S, h),
    )
    masks = {
        "prefix_mask": jnp.asarray(RNG.random((B, 1, 1, P)) < 0.6),
        "suffix_mask": jnp.asarray(RNG.random((B, N, S, S)) < 0.6).at[..., 0].set(True),
    }

    def both(prompt, branches):
        of_prompt = blocked_attention(*prompt, window, softcap=2.0, block=8)
        return of_prompt, branch_attention(*branches, **masks, softcap=2.0)

    def computed():
        total = lambda *arrays: sum((out**2).sum() for out in both(*arrays))
        # A function of its own each time: what was compiled for another number of scores is not to be found again.
        return jax.jit(lambda *arrays: (both(*arrays), jax.grad(total, argnums=(0, 1))(*arrays)))((q, k, v), branches)

    together = computed()
    monkeypatch.setattr(attention, "_CACHED_SCORES", 0)
    for one_by_one, all_together in zip(jax.tree.leaves(computed()), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one_by_one, all_together, atol=1e-5)


def test_blocked_attention_in_loops_has_the_gradient_of_one_block():
    q, k, v = normal(B, P, H, h), normal(B, K, h, C + P), normal(B, K, C + P, h)
    total = lambda block, *qkv: (blocked_attention(*qkv, 7, softcap=2.0, block=block) ** 2).sum()
    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3)), static_argnums=0)
    for looped, alone in zip(gradient(2, q, k, v), gradient(256, q, k, v), strict=True):
        np.testing.assert_allclose(looped, alone, atol=1e-5)


@pytest.mark.parametrize(
    "size, heads, window, softcap, shared",
    [(64, (4, 2), None, None, 0), pytest.param(128, (2, 1), 100, 2.0, 40, marks=pytest.mark.slow)],
)
def test_splash_attention_equals_blocked_attention(size, heads, window, softcap, shared):
    """The TPU's kernel, interpreted: outputs and gradients, behind a shared prefix, with a window and a soft-cap.

    A window is given as scanned layers have it: a traced number, here once the window and once none.
    """
    (many, few), tokens = heads, 300
    q = normal(1, tokens, many, size) * size**-0.5
    k, v = normal(1, few, size, shared + tokens), normal(1, few, shared + tokens, size)
    weight = normal(1, tokens, many, size)
    by_kernel = lambda window, *qkv: splash_attention(
        *qkv, window, sliding_window=100 if window is not None else None, softcap=softcap, interpret=True
    )
    by_xla = lambda window, *qkv: blocked_attention(*qkv, window, softcap=softcap)
    loss = lambda of, window, *qkv: (of(window, *qkv) * weight).sum()
    gradient = jax.jit(jax.grad(loss, argnums=(2, 3, 4)), static_argnums=0)
    for limit in (None,) if window is None else (jnp.int32(window), jnp.int32(1 << 30)):
        np.testing.assert_allclose(by_kernel(limit, q, k, v), by_xla(limit, q, k, v), atol=1e-5)
        for ours, expected in zip(gradient(by_kernel, limit, q, k, v), gradient(by_xla, limit, q, k, v), strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chip, size", [("v5e:2x2", 64), ("v5e:2x2", 256)])
def test_prompt_attention_compiles_to_the_kernel_on_a_tpu(chip, size):
    """For one chip and split over four, forward and backward, with a window and a soft-cap in scanned layers."""
    pytest.importorskip("libtpu")
    found = hardware.topology(chip)
    for mesh in (make_mesh(devices=found[:1]), make_mesh(2, 1, 2, found[:4])):

        def total(q, k, v, window):
            out = prompt_attention(q, k, v, window=window, sliding_window=256, softcap=30.0)
            return out.astype(jnp.float32).sum()

        array = lambda shape, axes, mesh=mesh: jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=sharding(shape, axes, mesh)
        )
        arrays = [
            array((2, 512, 4, size), ("batch", None, "heads", None)),
            array((2, 2, size, 512), ("batch", "heads", None, None)),
            array((2, 2, 512, size), ("batch", "heads", None, None)),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding((), (), mesh)),
        ]
        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile().as_text()
        assert "tpu_custom_call" in text and not count_collectives(text)
