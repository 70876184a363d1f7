"""The two attentions: a prompt over itself, and branches over their shared prompt and themselves.

`prompt_attention` is one function with two forms: blocks of queries that XLA compiles for any platform, and on a TPU
the splash attention kernel, which keeps scores on the chip. `branch_attention` needs none: its matmuls read the prompt
once for all branches as they are. Both are written for one key/value head of one prompt, and computed for all of them
together or, on a CPU, for one after another, so that scores stay in its cache.

Axes: B batch (prompts), N branches per prompt, C shared-prefix tokens, P prompt tokens, S branch tokens, M suffix-cache
length, H query heads, K key/value heads, G = H / K query heads per key/value head, h head size.

Values are [..., tokens, h] and keys [..., h, tokens]: every product here is then a plain batched matmul over (B, K) of
operands that lie in memory as it reads them. Scores and softmax are float32 throughout.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.distributed.sharding import partition_spec

_KERNEL_TOKENS = 256  # prompts of fewer are left to XLA
_KERNEL_BLOCK = 512  # most queries, and most keys, of a block of the kernel; both are multiples of 128
_MAX_SEGMENTS = 8  # for compile time: each is a program of its own
_CACHED_SCORES = 1 << 20  # a CPU takes heads one by one where those of all have more; four bytes each
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
    sliding_window: int | None,
    softcap: float | None,
) -> Float[Array, "B P H h"]:
    """Causal self-attention; `q` is already scaled. The C + P keys begin C tokens before the queries.

    Padding is on the right, so causality alone hides it from every real query; padded queries give finite nonsense.

    Args:
      window: how many positions back a query attends, itself included; None for no limit. Where layers are scanned it
        is traced: `sliding_window` or far more than there are keys.
      sliding_window: what `window` is in layers that slide.
    """
    by_xla = functools.partial(blocked_attention, softcap=softcap)
    if q.shape[1] < _KERNEL_TOKENS:
        return by_xla(q, k, v, window)
    static = dict(sliding_window=sliding_window, softcap=softcap)
    by_kernel = functools.partial(_on_each_device, functools.partial(splash_attention, **static))
    return jax.lax.platform_dependent(q, k, v, window, tpu=by_kernel, default=by_xla)


def _on_each_device(attention, q, k, v, window):
    """Call a kernel on each device's own prompts and heads; XLA does not split kernels by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attention(q, k, v, window)
    batch, heads, *_ = partition_spec(k.shape, ("batch", "heads", None, None), mesh)
    of_q = jax.sharding.PartitionSpec(batch, None, heads)
    of_kv, everywhere = jax.sharding.PartitionSpec(batch, heads), jax.sharding.PartitionSpec()
    specs = (of_q, of_kv, of_kv, None if window is None else everywhere)
    return jax.shard_map(attention, in_specs=specs, out_specs=of_q, check_vma=False)(q, k, v, window)


def splash_attention(q, k, v, window, *, sliding_window, softcap, interpret=False):
    """`prompt_attention` by jax's splash attention kernel for TPUs.

    Args:
      interpret: run the kernel on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    P, H, C = q.shape[1], q.shape[2], k.shape[3] - q.shape[1]
    T, keys = (-(-n // 128) * 128 for n in (P, C + P))
    q = jnp.pad(q.swapaxes(1, 2), [(0, 0)] * 2 + [(0, T - P), (0, 0)])
    k = jnp.pad(k.swapaxes(2, 3), [(0, 0)] * 2 + [(0, keys - C - P), (0, 0)])
    v = jnp.pad(v, [(0, 0)] * 2 + [(0, keys - C - P), (0, 0)])
    block_q, block_kv = (next(b for b in range(_KERNEL_BLOCK, 0, -128) if n % b == 0) for n in (T, keys))
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
        k_layout=splash.QKVLayout.SEQ_MINOR,  # as the cache has them
    )

    def attend(limit: int | None):
        if limit is None or limit >= keys:
            mask = masks.CausalMask((T, keys), offset=C)
        else:
            mask = masks.LocalMask((T, keys), (limit - 1, 0), offset=C)
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * H),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return lambda q, k, v: jax.vmap(kernel)(q, k, v)

    if window is None or isinstance(window, int) or sliding_window is None or sliding_window >= keys:
        out = attend(window if isinstance(window, int) else None)(q, k, v)
    else:
        out = jax.lax.cond(window <= sliding_window, attend(sliding_window), attend(None), q, k, v)
    return out[:, :, :P].swapaxes(1, 2)


def blocked_attention(
    q: Float[Array, "B P H h"],
    k: Float[Array, "B K h keys"],
    v: Float[Array, "B K keys h"],
    window: int | Int[Array, ""] | None,
    *,
    softcap: float | None,
    block: int = 256,
) -> Float[Array, "B P H h"]:
    """`prompt_attention` in blocks of queries.

    Each segment of blocks attends to a static number of keys, which all but halves the work of a full square; blocks
    keep the scores small.
    """
    B, P, H, h = q.shape
    K = k.shape[1]
    q = q.reshape(B, P, K, H // K, h).transpose(0, 2, 3, 1, 4)  # B K G P h
    attend = functools.partial(_blocked_head, window=window, softcap=softcap, block=block)
    out = _for_each_head(attend, (q, k, v), (), scores=B * H * min(block, P) * k.shape[3])
    return out.transpose(0, 3, 1, 2, 4).reshape(B, P, H, h)


def _blocked_head(
    q: Float[Array, "G P h"], k: Float[Array, "h keys"], v: Float[Array, "keys h"], *, window, softcap, block
) -> Float[Array, "G P h"]:
    """`blocked_attention` of the query heads of one key/value head."""
    G, P, h = q.shape
    C = k.shape[1] - P

    # The backward pass recomputes a block's scores: saved, they would be most of a step's memory, and cost more to
    # write and read back than the matmuls that give them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(q, k, v, window, first):
        """Queries, the first of them at key `first`, over all the keys."""
        T, keys = q.shape[1], k.shape[1]
        scores = _scores(q.reshape(-1, h), k, softcap).reshape(G, T, keys)
        query, key = first + jnp.arange(T)[:, None], jnp.arange(keys)[None]
        mask = key <= query
        if window is not None:
            mask &= query - key < window
        weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1).astype(v.dtype)
        return (weights.reshape(-1, keys) @ v).reshape(q.shape)

    def attend_blocks(q, k, v, first):
        """The same of several blocks, one after another in a loop, the last one padded."""
        T = q.shape[1]
        count = -(-T // block)
        q = jnp.pad(q, [(0, 0), (0, count * block - T), (0, 0)]).reshape(G, count, block, h)
        firsts = first + block * jnp.arange(count)
        out = jax.lax.map(lambda xs: attend(xs[0], k, v, window, xs[1]), (jnp.moveaxis(q, 1, 0), firsts))
        return jnp.moveaxis(out, 0, 1).reshape(G, count * block, h)[:, :T]

    # Each segment is compiled for its own number of keys. In a short prompt it is one block.
    segment = block * -(-P // (block * _MAX_SEGMENTS))
    segments = []
    for start in range(0, P, segment):
        stop = min(start + segment, P)
        keys = C + stop
        queries, seen_k, seen_v = q[:, start:stop], k[:, :keys], v[:keys]
        if segment == block:
            segments.append(attend(queries, seen_k, seen_v, window, C + start))
        else:
            segments.append(attend_blocks(queries, seen_k, seen_v, C + start))
    return jnp.concatenate(segments, axis=1)


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
    K, P, M = prefix_k.shape[1], prefix_k.shape[3], suffix_k.shape[4]
    q = q.reshape(B, N, S, K, H // K, h).transpose(0, 3, 1, 4, 2, 5)  # B K N G S h
    heads, masks = (q, prefix_k, prefix_v, suffix_k, suffix_v), (prefix_mask, suffix_mask)
    attend = functools.partial(_branch_head, softcap=softcap)
    out = _for_each_head(attend, heads, masks, scores=B * H * N * S * (P + M))
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, N, S, H, h)


def _branch_head(
    q: Float[Array, "N G S h"],
    prefix_k: Float[Array, "h P"],
    prefix_v: Float[Array, "P h"],
    suffix_k: Float[Array, "N h M"],
    suffix_v: Float[Array, "N M h"],
    prefix_mask: Bool[Array, "#N #S P"],
    suffix_mask: Bool[Array, "N S M"],
    *,
    softcap: float | None,
) -> Float[Array, "N G S h"]:
    """`branch_attention` of the query heads of one key/value head."""
    N, G, S, h = q.shape
    prefix = _scores(q.reshape(N * G * S, h), prefix_k, softcap).reshape(N, G, S, -1)
    suffix = _scores(q.reshape(N, G * S, h), suffix_k, softcap).reshape(N, G, S, -1)
    prefix = jnp.where(prefix_mask[:, None], prefix, _MASKED)
    suffix = jnp.where(suffix_mask[:, None], suffix, _MASKED)

    top = jax.lax.stop_gradient(jnp.maximum(prefix.max(-1), suffix.max(-1)))[..., None]
    prefix, suffix = jnp.exp(prefix - top), jnp.exp(suffix - top)
    total = prefix.sum(-1) + suffix.sum(-1)
    out = (prefix.astype(prefix_v.dtype).reshape(N * G * S, -1) @ prefix_v).reshape(N, G, S, h)
    out = out.astype(jnp.float32)
    out += (suffix.astype(suffix_v.dtype).reshape(N, G * S, -1) @ suffix_v).reshape(N, G, S, h)
    return (out / total[..., None]).astype(q.dtype)


def _for_each_head(attend: Callable, heads: tuple, of_prompts: tuple, *, scores: int) -> Float[Array, "B K ..."]:
    """`attend(*heads, *of_prompt)` for every key/value head of every prompt.

    Args:
      heads: arrays [B K ...] that are split by prompt and head.
      of_prompts: arrays [B ...] that are the same for all heads of a prompt.
      scores: how many there are at a time if all are computed together.
    """

    def together(heads, of_prompts):
        of_prompt = jax.vmap(attend, in_axes=(0,) * len(heads) + (None,) * len(of_prompts))
        return jax.vmap(of_prompt)(*heads, *of_prompts)

    def one_by_one(heads, of_prompts):
        # Nothing is saved of a head for the backward pass but what it is computed from, as of a block.
        attend_again = jax.checkpoint(attend, prevent_cse=False)
        B, K = heads[0].shape[:2]

        def of_head(xs):
            i, head = xs
            return attend_again(*head, *(jax.lax.dynamic_index_in_dim(a, i // K, keepdims=False) for a in of_prompts))

        flat = [a.reshape(B * K, *a.shape[2:]) for a in heads]
        out = jax.lax.map(of_head, (jnp.arange(B * K), flat))
        return out.reshape(B, K, *out.shape[1:])

    mesh = jax.sharding.get_abstract_mesh()
    if scores <= _CACHED_SCORES or not (mesh.empty or mesh.size == 1):
        return together(heads, of_prompts)
    return jax.lax.platform_dependent(heads, of_prompts, cpu=one_by_one, default=together)
