"""The two attentions: a prompt over itself, and branches over their shared prompt and themselves.

Axes: B batch (prompts), N branches per prompt, C shared-prefix tokens, P prompt tokens, S branch tokens, M suffix-cache
length, H query heads, K key/value heads, G = H / K query heads per key/value head, h head size.

Values are [..., tokens, h] and keys [..., h, tokens]: every product here is then a plain batched matmul over (B, K) of
operands that lie in memory as it reads them. Scores and softmax are float32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MAX_SEGMENTS = 8  # for compile time: each is a program of its own
_MASKED = -1e30  # finite: a row with every key masked stays finite, and so does its gradient


def _scores(q, k, softcap):
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def prompt_attention(
    q: Float[Array, "B P H h"],
    k: Float[Array, "B K h keys"],
    v: Float[Array, "B K keys h"],
    *,
    window: int | Int[Array, ""] | None,
    softcap: float | None,
    block: int = 256,
) -> Float[Array, "B P H h"]:
    """Causal self-attention in blocks of queries; `q` is already scaled. The C + P keys begin C tokens before them.

    Each segment of blocks attends to a static number of keys, which all but halves the work of a full square; blocks
    keep the scores small. Padding is on the right, so causality alone hides it from every real query; padded queries
    give finite nonsense.

    Args:
      window: how many positions back a query attends, itself included; None for no limit.
    """
    B, P, H, h = q.shape
    K, C = k.shape[1], k.shape[3] - P
    q = q.reshape(B, P, K, H // K, h).transpose(0, 2, 3, 1, 4)  # B K G P h

    # The backward pass recomputes a block's scores: saved, they would be most of a step's memory, and cost more to
    # write and read back than the matmuls that give them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(q, k, v, window, first):
        """Queries, the first of them at key `first`, over all the keys."""
        T, keys = q.shape[3], k.shape[3]
        scores = _scores(q.reshape(B, K, -1, h), k, softcap).reshape(B, K, H // K, T, keys)
        query, key = first + jnp.arange(T)[:, None], jnp.arange(keys)[None]
        mask = key <= query
        if window is not None:
            mask &= query - key < window
        weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1).astype(v.dtype)
        return (weights.reshape(B, K, -1, keys) @ v).reshape(q.shape)

    def attend_blocks(q, k, v, first):
        """The same of several blocks, one after another in a loop, the last one padded."""
        T = q.shape[3]
        count = -(-T // block)
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, count * block - T), (0, 0)]).reshape(B, K, H // K, count, block, h)
        firsts = first + block * jnp.arange(count)
        out = jax.lax.map(lambda xs: attend(xs[0], k, v, window, xs[1]), (jnp.moveaxis(q, 3, 0), firsts))
        return jnp.moveaxis(out, 0, 3).reshape(B, K, H // K, count * block, h)[:, :, :, :T]

    # Each segment is compiled for its own number of keys. In a short prompt it is one block.
    segment = block * -(-P // (block * _MAX_SEGMENTS))
    segments = []
    for start in range(0, P, segment):
        stop = min(start + segment, P)
        keys = C + stop
        queries, seen_k, seen_v = q[:, :, :, start:stop], k[..., :keys], v[:, :, :keys]
        if segment == block:
            segments.append(attend(queries, seen_k, seen_v, window, C + start))
        else:
            segments.append(attend_blocks(queries, seen_k, seen_v, C + start))
    return jnp.concatenate(segments, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, P, H, h)


def branch_attention(
    q: Float[Array, "B N S H h"],
    prefix_k: Float[Array, "B K h P"],
    prefix_v: Float[Array, "B K P h"],
    suffix_k: Float[Array, "B K N h M"],
    suffix_v: Float[Array, "B K N M h"],
    *,
    prefix_mask: Bool[Array, "B #N #S P"],
    suffix_mask: Bool[Array, "B N S M"],
    softcap: float | None,
) -> Float[Array, "B N S H h"]:
    """Attention of each branch over its prompt, read once for all N branches, and over itself; `q` is already scaled.

    One softmax spans both parts: their sums share a maximum and a denominator, and nothing of length P + M is joined.
    """
    B, N, S, H, h = q.shape
    K, G = prefix_k.shape[1], H // prefix_k.shape[1]
    q = q.reshape(B, N, S, K, G, h).transpose(0, 3, 1, 4, 2, 5)  # B K N G S h

    prefix = _scores(q.reshape(B, K, N * G * S, h), prefix_k, softcap).reshape(B, K, N, G, S, -1)
    suffix = _scores(q.reshape(B, K, N, G * S, h), suffix_k, softcap).reshape(B, K, N, G, S, -1)
    prefix = jnp.where(prefix_mask[:, None, :, None], prefix, _MASKED)
    suffix = jnp.where(suffix_mask[:, None, :, None], suffix, _MASKED)

    top = jax.lax.stop_gradient(jnp.maximum(prefix.max(-1), suffix.max(-1)))[..., None]
    prefix, suffix = jnp.exp(prefix - top), jnp.exp(suffix - top)
    total = prefix.sum(-1) + suffix.sum(-1)
    out = (prefix.astype(prefix_v.dtype).reshape(B, K, N * G * S, -1) @ prefix_v).reshape(B, K, N, G, S, h)
    out = out.astype(jnp.float32)
    out += (suffix.astype(suffix_v.dtype).reshape(B, K, N, G * S, -1) @ suffix_v).reshape(B, K, N, G, S, h)
    out = (out / total[..., None]).astype(q.dtype)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, N, S, H, h)
