"""The network: one decoder for every family, built on `prefill` (a prompt, once) and `extend` (its N branches).

Axes: B batch, N branches, C shared beginning, P prompt, S branch length, M own-cache slots, L layers, D model,
H query heads, K key/value heads, h head size, V vocabulary.

Layers and caches are stacked and scanned. Where `extend_cached` gets them apart, layer by layer, it is unrolled
instead: a scan copies each layer's arrays before it uses them, which on a CPU takes a third of a decoding step.

A prompt's last token opens every branch: prefill takes `tokens[:-1]`, a branch is `[tokens[-1], *response[:-1]]` and
its targets are the response. So prefill needs no logits and the vocabulary projection meets response positions only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from roserag_jax.distributed.sharding import constrain
from roserag_jax.models import rope
from roserag_jax.models.attention import branch_attention, prompt_attention
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import Linear, LoRAConfig, project

Apart = tuple[Float[Array, "B ..."], ...]  # what is else stacked over layers, one array a layer


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "lengths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the prompts, read by every branch and never written."""

    k: Float[Array, "L B K h P"] | Apart
    v: Float[Array, "L B K P h"] | Apart
    lengths: Int[Array, "B"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "positions", "used", "slot"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class OwnCache:
    """Keys and values of the branches themselves, in a ring of M slots.

    All branches write the same slot; `used` marks the tokens that a branch has, so each may have begun at any time.
    """

    k: Float[Array, "L B K N h M"] | Apart
    v: Float[Array, "L B K N M h"] | Apart
    positions: Int[Array, "B N M"]
    used: Bool[Array, "B N M"]
    slot: Int[Array, ""]


def unstack(tree) -> tuple:
    """A tree of arrays stacked over layers as one tree a layer."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(structure.unflatten(of_layer) for of_layer in zip(*leaves, strict=True))


def _write(cache, index, new, at):
    """Write a layer's new keys or values [B ...] at `at` of its own cache; all layers' caches, and this layer's."""
    if isinstance(cache, tuple):
        of_layer = jax.lax.dynamic_update_slice(cache[index], new, at)
        return (*cache[:index], of_layer, *cache[index + 1 :]), of_layer
    cache = jax.lax.dynamic_update_slice(cache, new[None], (index, *at))
    return cache, jax.lax.dynamic_index_in_dim(cache, index, keepdims=False)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; Gemma multiplies by 1 + weight before rounding, the others by weight after."""

    def __init__(self, config: ModelConfig, shape, axes, dtype):
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one
        fill = jnp.zeros if self.plus_one else jnp.ones
        self.scale = nnx.Param(fill(shape, dtype), axes=axes)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...] * y.astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Layer(nnx.Module):
    """One decoder layer, declared stacked over all L and called on one slice of itself."""

    def __init__(self, config: ModelConfig, lora: LoRAConfig, dtype, rngs: nnx.Rngs):
        c, L, D = config, config.num_layers, config.embed_dim
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        linear = lambda name, i, o, axes, bias: Linear(name, c, i, o, axes, lora, dtype, rngs, bias)
        norm = lambda size: RMSNorm(c, (L, size), ("layers", None), dtype)
        self.config = c
        self.attn_norm, self.mlp_norm = norm(D), norm(D)
        self.q_proj = linear("q_proj", D, q_dim, ("embed", "heads"), c.qkv_bias)
        self.k_proj = linear("k_proj", D, kv_dim, ("embed", "heads"), c.qkv_bias)
        self.v_proj = linear("v_proj", D, kv_dim, ("embed", "heads"), c.qkv_bias)
        self.o_proj = linear("o_proj", q_dim, D, ("heads", "embed"), c.out_bias)
        self.gate_proj = linear("gate_proj", D, c.mlp_dim, ("embed", "mlp"), c.mlp_bias)
        self.up_proj = linear("up_proj", D, c.mlp_dim, ("embed", "mlp"), c.mlp_bias)
        self.down_proj = linear("down_proj", c.mlp_dim, D, ("mlp", "embed"), c.mlp_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)
        if c.post_norms:
            self.post_attn_norm, self.post_mlp_norm = norm(D), norm(D)

    def qkv(self, x: Float[Array, "T D"], angles, key):
        """Queries (scaled) [T, H, h], keys and values [T, K, h], rotated to their positions."""
        c, (cos, sin) = self.config, angles
        x = self.attn_norm(x)
        q = self.q_proj(x, key).reshape(-1, c.num_heads, c.head_dim)
        k = self.k_proj(x, key).reshape(-1, c.num_kv_heads, c.head_dim)
        v = self.v_proj(x, key).reshape(-1, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        # In bfloat16 the scale itself would be rounded, where it is no power of two.
        scaled = (rope.rotate(q, cos, sin).astype(jnp.float32) * c.attention_scale).astype(q.dtype)
        return scaled, rope.rotate(k, cos, sin), v

    def finish(self, x: Float[Array, "T D"], attended: Float[Array, "T Hh"], key) -> Float[Array, "T D"]:
        """Output projection and MLP, each added to the residual stream."""
        y = self.o_proj(attended, key)
        x = x + (self.post_attn_norm(y) if self.config.post_norms else y)
        y = self.mlp_norm(x)
        # In float32, rounded once: in bfloat16 a backend may round between the steps of the activation.
        gate, up = (project(y, key).astype(jnp.float32) for project in (self.gate_proj, self.up_proj))
        y = self.down_proj((ACTIVATIONS[self.config.activation](gate) * up).astype(y.dtype), key)
        return x + (self.post_mlp_norm(y) if self.config.post_norms else y)


_REMAT = {
    "none": lambda body: body,
    "layer": functools.partial(jax.checkpoint, prevent_cse=False),  # inside a scan nothing can be merged
    "dots": functools.partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names("attended"),
        ),
    ),
}


class Transformer(nnx.Module):
    """Decoder-only language model with stacked, scanned layers.

    Args:
      config: sizes and mathematics.
      lora: the adapter inside its linear layers; the default has none.
      dtype: of the frozen weights and the activations; adapters, softmax, norms and log-probabilities are float32.
      rngs: for a random network; weights are otherwise loaded over an abstract one (`models.weights`).
    """

    def __init__(self, config: ModelConfig, lora: LoRAConfig, dtype, rngs: nnx.Rngs):
        shape, axes = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        table = lambda: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype), axes=axes)
        self.config = config
        self.embed = table()
        self.layers = Layer(config, lora, dtype, rngs)
        self.final_norm = RMSNorm(config, (config.embed_dim,), (None,), dtype)
        self.head = None if config.tie_embeddings else table()

    @property
    def table(self) -> Float[Array, "V D"]:
        """The vocabulary projection, tied to the embedding or not."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of normed hidden states, in float32 and soft-capped where the family does so."""
        logits = project(hidden.reshape(-1, hidden.shape[-1]), self.table, jnp.float32)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def prefill(
        self,
        prompt: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        shared: PrefixCache | None = None,
        *,
        remat: str = "none",
        dropout_key=None,
        hidden: bool = False,
    ) -> PrefixCache | tuple[PrefixCache, Float[Array, "B P D"]]:
        """Keys and values of right-padded prompts, each without its last token.

        Args:
          lengths: real tokens of each row of `prompt`; 0 is allowed (a prompt of one token).
          shared: the C tokens that all prompts begin with, as `prefill` of one row without padding returned them;
            `prompt` is then what follows, and the result holds both.
          remat: what the backward pass recomputes: 'none', 'layer' (all of a layer) or 'dots' (all but projections and
            attention's output).
          dropout_key: LoRA dropout, in training only.
          hidden: return the normed hidden states as well.
        """
        c = self.config
        B, P = prompt.shape
        C = 0 if shared is None else shared.v.shape[3]
        positions = jnp.broadcast_to(C + jnp.arange(P), (B, P)).reshape(-1)

        def body(x, layer, angles, window, key, xs):
            number, before = xs
            q, k, v = layer.qkv(x, angles, key)
            q = q.reshape(B, P, c.num_heads, c.head_dim)
            k, v = (a.reshape(B, P, c.num_kv_heads, c.head_dim) for a in (k, v))
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            if before is not None:
                join = lambda first, rest, axis: jnp.concatenate([jnp.repeat(first, B, axis=0), rest], axis)
                k, v = join(before[0], k, 3), join(before[1], v, 2)
            k, v = (constrain(a, "batch", "heads", None, None) for a in (k, v))

            def finish(x):
                with jax.named_scope("prompt_attention"):
                    out = prompt_attention(q, k, v, window=window, softcap=c.attention_softcap)
                return layer.finish(x, checkpoint_name(out.reshape(B * P, -1), "attended"), key)

            if not hidden:  # then of the last layer only keys and values are wanted
                finish = functools.partial(jax.lax.cond, number < c.num_layers - 1, finish, lambda x: x)
            return finish(x), (k, v)

        x = self._embed(prompt)
        before = None if shared is None else (shared.k, shared.v)
        xs = jnp.arange(c.num_layers), before
        x, (k, v) = self._scan(body, x, positions, xs, remat, dropout_key)
        cache = PrefixCache(k, v, C + lengths)
        return (cache, self.final_norm(x).reshape(B, P, -1)) if hidden else cache

    def extend(
        self, branches: Int[Array, "B N S"], cache: PrefixCache, *, remat: str = "none", dropout_key=None
    ) -> Float[Array, "B N S D"]:
        """Normed hidden states of N branches per prompt. A branch sees the prompt and itself, never a sibling.

        Right padding of a branch needs no mask: causality hides it from every real token.
        """
        B, N, S = branches.shape
        start = jnp.broadcast_to(cache.lengths[:, None, None], (B, N, 1))
        positions = start + jnp.arange(S)
        own_seen = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, N, S, S))
        hidden, _ = self._branches(
            branches, positions, positions, own_seen, cache, remat=remat, dropout_key=dropout_key
        )
        return hidden

    def extend_cached(
        self, branches: Int[Array, "B N S"], real: Bool[Array, "B N S"], cache: PrefixCache, own: OwnCache, layers=None
    ) -> tuple[Float[Array, "B N S D"], OwnCache]:
        """`extend` that goes on from what each branch has already said, and remembers what it says now.

        Args:
          real: False for padding, which takes a slot but no position and is never seen.
          own: its S slots from `own.slot` on are overwritten, and must not go over the end; donate it.
          layers: the layers' parameters apart (`unstack`), if both caches are apart as well.
        """
        S, M = branches.shape[2], own.used.shape[-1]
        before = cache.lengths[:, None, None] + own.used.sum(-1, keepdims=True)
        positions = before + jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
        at = (0, 0, own.slot)
        used = jax.lax.dynamic_update_slice(own.used, real, at)
        slot_positions = jax.lax.dynamic_update_slice(own.positions, positions, at)
        age = jnp.arange(M) - own.slot  # of the slots written now: 0 to S - 1
        later = (age > jnp.arange(S)[:, None]) & (age < S)
        own_seen = used[:, :, None, :] & ~later
        hidden, (k, v) = self._branches(branches, positions, slot_positions, own_seen, cache, own, layers)
        return hidden, OwnCache(k, v, slot_positions, used, (own.slot + S) % M)

    def own_cache(self, batch: int, branches: int, slots: int) -> OwnCache:
        """An empty own cache of `slots` tokens for each branch."""
        c, dtype = self.config, self.embed[...].dtype
        rows, flat = (c.num_layers, batch, c.num_kv_heads, branches), (batch, branches, slots)
        empty = lambda *sizes: constrain(jnp.zeros(rows + sizes, dtype), None, "batch", "heads", None, None, None)
        return OwnCache(
            empty(c.head_dim, slots),
            empty(slots, c.head_dim),
            jnp.zeros(flat, jnp.int32),
            jnp.zeros(flat, bool),
            jnp.int32(0),
        )

    def _branches(
        self, branches, positions, key_positions, own_seen, cache, own=None, layers=None, remat="none", dropout_key=None
    ):
        """Shared body of `extend` and `extend_cached`: normed hidden states and the own keys and values."""
        c = self.config
        B, N, S = branches.shape
        P = cache.v[0].shape[-2]
        prefix_seen = jnp.arange(P) < cache.lengths[:, None, None, None]

        def body(carry, layer, angles, window, key, xs):
            (x, own_kv), (index, prefix_k, prefix_v) = carry, xs
            q, k, v = layer.qkv(x, angles, key)
            q = q.reshape(B, N, S, c.num_heads, c.head_dim)
            k, v = (a.reshape(B, N, S, c.num_kv_heads, c.head_dim) for a in (k, v))
            k, v = k.transpose(0, 3, 1, 4, 2), v.transpose(0, 3, 1, 2, 4)
            k, v = (constrain(a, "batch", "heads", None, None, None) for a in (k, v))
            if own_kv is not None:
                own_k, k = _write(own_kv[0], index, k, (0, 0, 0, 0, own.slot))
                own_v, v = _write(own_kv[1], index, v, (0, 0, 0, own.slot, 0))
                own_kv = own_k, own_v
            seen_prefix, seen_own = prefix_seen, own_seen
            if window is not None:
                seen_prefix = seen_prefix & (positions[..., None] - jnp.arange(P) < window)
                seen_own &= positions[..., None] - key_positions[:, :, None] < window
            with jax.named_scope("branch_attention"):
                out = branch_attention(
                    q,
                    prefix_k,
                    prefix_v,
                    k,
                    v,
                    prefix_seen=seen_prefix,
                    own_seen=seen_own,
                    softcap=c.attention_softcap,
                )
            return (layer.finish(x, checkpoint_name(out.reshape(B * N * S, -1), "attended"), key), own_kv), None

        x = self._embed(branches)
        carry = (x, None if own is None else (own.k, own.v))
        numbers = jnp.arange(c.num_layers) if layers is None else range(c.num_layers)
        (x, own_kv), _ = self._scan(
            body, carry, positions.reshape(-1), (numbers, cache.k, cache.v), remat, dropout_key, layers
        )
        return self.final_norm(x).reshape(B, N, S, -1), own_kv

    def _embed(self, tokens: Int[Array, "..."]) -> Float[Array, "T D"]:
        x = self.embed[...][tokens]
        if self.config.embed_scale != 1.0:
            x *= jnp.asarray(self.config.embed_scale, x.dtype)
        return constrain(x.reshape(-1, x.shape[-1]), "batch", None)

    def _scan(self, body, carry, positions, xs, remat, dropout_key, layers=None):
        """Scan `body(carry, layer, angles, window, key, xs)` over the layers.

        Layers that differ (sliding or full attention, and their RoPE base) differ in scanned data, not in code.

        Args:
          layers: the layers' parameters apart; nothing is scanned then, each of `xs` has an entry a layer, and what
            the body returns beside the carry is dropped.
        """
        c = self.config
        graph, state = nnx.split(self.layers)
        angles = [rope.tables(positions, rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))]
        sliding = window = None
        if c.sliding_window is not None:
            sliding = jnp.asarray(c.sliding_layers)
            window = jnp.where(sliding, c.sliding_window, np.iinfo(np.int32).max)
            if c.rope_local_theta is not None:
                angles.append(rope.tables(positions, rope.inverse_frequencies(c.head_dim, c.rope_local_theta)))
        keys = None if dropout_key is None else jax.random.split(dropout_key, c.num_layers)

        def step(carry, scanned):
            layer_state, slides, layer_window, key, layer_xs = scanned
            of_layer = angles[0]
            if len(angles) == 2:
                of_layer = jax.tree.map(lambda full, local: jnp.where(slides, local, full), *angles)
            return body(carry, nnx.merge(graph, layer_state), of_layer, layer_window, key, layer_xs)

        if layers is None:
            return jax.lax.scan(_REMAT[remat](step), carry, (state, sliding, window, keys, xs))
        for i, layer in enumerate(layers):
            of_layer = [None if a is None else a[i] for a in (sliding, window, keys)]
            carry, _ = step(carry, (layer, *of_layer, tuple(x[i] for x in xs)))
        return carry, None
