"""The network: one decoder for every family, built on `prefill` (a prompt, once) and `extend` (its N branches).

Axes: B batch (prompts), N branches per prompt, C shared-prefix tokens, P prompt tokens, S branch tokens,
M suffix-cache length, T flattened tokens, L layers, D model width, H query heads, K key/value heads, h head size,
V vocabulary.

`Layer.__call__` is the residual block. What differs between the entry points is how a layer's keys and values are
stored and what its queries attend to, so each of them hands the block two functions, `store` and `attend`.

A prompt's last token opens every branch: prefill takes `tokens[:-1]`, a branch is `[tokens[-1], *response[:-1]]` and
its targets are the response. So prefill needs no logits and the vocabulary projection meets response positions only.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from roserag_jax.distributed.sharding import constrain, devices, held_kv_heads
from roserag_jax.models import rope
from roserag_jax.models.attention import branch_attention, prompt_attention
from roserag_jax.models.cache import PrefixCache, SuffixCache
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import Linear, LoRAConfig, LoRAParam, project

Angles = tuple[Float[Array, "T half"], Float[Array, "T half"]]  # cosine and sine of each token's position


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; Gemma multiplies by 1 + weight before rounding, the others by weight after."""

    def __init__(self, config: ModelConfig, shape, axes, dtype):
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one
        fill = jnp.zeros if self.plus_one else jnp.ones
        self.scale = nnx.Param(fill(shape, dtype), axes=axes)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalize the last axis."""
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


def _unchanged(x):
    return x


class Layer(nnx.Module):
    """One decoder layer, declared stacked over all L and called on one slice of itself."""

    def __init__(self, config: ModelConfig, lora: LoRAConfig, dtype, rngs: nnx.Rngs, quantized: bool = False):
        c, L, D = config, config.num_layers, config.embed_dim
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        linear = lambda name, i, o, axes, bias: Linear(name, c, i, o, axes, lora, dtype, rngs, bias, quantized)
        norm = lambda size, wanted=True: RMSNorm(c, (L, size), ("layers", None), dtype) if wanted else _unchanged
        self.config = c
        self.attn_norm, self.mlp_norm = norm(D), norm(D)
        self.post_attn_norm, self.post_mlp_norm = norm(D, c.post_norms), norm(D, c.post_norms)
        self.q_norm, self.k_norm = norm(c.head_dim, c.qk_norm), norm(c.head_dim, c.qk_norm)
        self.q_proj = linear("q_proj", D, q_dim, ("embed", "heads"), c.qkv_bias)
        self.k_proj = linear("k_proj", D, kv_dim, ("embed", "heads"), c.qkv_bias)
        self.v_proj = linear("v_proj", D, kv_dim, ("embed", "heads"), c.qkv_bias)
        self.o_proj = linear("o_proj", q_dim, D, ("heads", "embed"), c.out_bias)
        self.gate_proj = linear("gate_proj", D, c.mlp_dim, ("embed", "mlp"), c.mlp_bias)
        self.up_proj = linear("up_proj", D, c.mlp_dim, ("embed", "mlp"), c.mlp_bias)
        self.down_proj = linear("down_proj", c.mlp_dim, D, ("mlp", "embed"), c.mlp_bias)

    def __call__(
        self,
        x: Float[Array, "T D"],
        angles: Angles,
        *,
        store: Callable,
        attend: Callable,
        dropout_key: Key[Array, ""] | None = None,
        needs_output: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "T D"], Any]:
        """The residual block: attention, then the MLP, each added to the residual stream.

        Args:
          store: takes this layer's new keys and values [T, K, h]; returns the keys and the values to attend to, and
            what the caller keeps of them, which is returned.
          attend: takes the scaled queries [T, H, h] and the keys and values to attend to; returns [T, H, h].
          needs_output: where False, only the keys and values are computed and `x` is returned as it is.
        """
        q, k, v = self.qkv(self.attn_norm(x), angles, dropout_key)
        k, v, kept = store(k, v)

        def block(x):
            attended = constrain(attend(q, k, v), "batch", "heads", None).reshape(len(x), -1)
            attended = checkpoint_name(constrain(attended, "batch", "heads"), "attention")
            x += self.post_attn_norm(self.o_proj(attended, dropout_key))
            x += self.post_mlp_norm(self.mlp(self.mlp_norm(x), dropout_key))
            return x

        x = block(x) if needs_output is None else jax.lax.cond(needs_output, block, _unchanged, x)
        return x, kept

    def qkv(
        self, x: Float[Array, "T D"], angles: Angles, dropout_key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "T H h"], Float[Array, "T K h"], Float[Array, "T K h"]]:
        """Scaled queries, keys and values of normed tokens, rotated to their positions."""
        c, (cos, sin) = self.config, angles

        def project_to_heads(projection: Linear, count: int):
            # On devices that do not divide the heads, a weight is split inside of one: its product is then gathered,
            # and not the weight. From here on a device has whole heads.
            y = constrain(projection(x, dropout_key), "batch", "heads")
            return constrain(y.reshape(-1, count, c.head_dim), "batch", "heads", None)

        held = _held_heads(c)
        hold = lambda a: constrain(jnp.repeat(a, held // c.num_kv_heads, axis=1), "batch", "heads", None)
        q = self.q_norm(project_to_heads(self.q_proj, c.num_heads))
        k = self.k_norm(hold(project_to_heads(self.k_proj, c.num_kv_heads)))
        v = hold(project_to_heads(self.v_proj, c.num_kv_heads))
        # In bfloat16 the scale itself would be rounded, unless it is a power of two.
        scaled = (rope.rotate(q, cos, sin).astype(jnp.float32) * c.attention_scale).astype(q.dtype)
        return scaled, rope.rotate(k, cos, sin), v

    def mlp(self, x: Float[Array, "T D"], dropout_key: Key[Array, ""] | None) -> Float[Array, "T D"]:
        """Gated MLP of normed tokens."""
        # In float32, rounded once: in bfloat16 a backend may round between the steps of the activation.
        gate, up = (proj(x, dropout_key).astype(jnp.float32) for proj in (self.gate_proj, self.up_proj))
        return self.down_proj((ACTIVATIONS[self.config.activation](gate) * up).astype(x.dtype), dropout_key)


_REMAT = {
    "none": lambda body: body,
    # As 'none', but gathered weights are gathered again: kept, those of all layers would stand on every device.
    "gathered": functools.partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_anything_except_these_names("gathered"),
    ),
    "layer": functools.partial(jax.checkpoint, prevent_cse=False),  # inside a scan nothing can be merged
    "dots": functools.partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    ),
}


def _gathered(layer: nnx.State) -> nnx.State:
    """A layer's parameters with the dimensions gathered that fsdp shards."""

    def gather(variable):
        _, *axes = variable.get_metadata()["axes"]  # the first is the layer's, which the scan has taken
        value = constrain(variable.get_value(), *(None if axis == "embed" else axis for axis in axes))
        return variable.replace(checkpoint_name(value, "gathered"))

    return jax.tree.map(gather, layer, is_leaf=lambda leaf: hasattr(leaf, "get_metadata"))


def _with_adapter_of_each_device(layer: Layer) -> Layer:
    """A layer whose adapter is an array of copies, one for each device that the batch is split over.

    The gradient of each copy is its device's own, of all that the layer computes with it; their sum, into the adapter,
    is the only thing sent. Left to the partitioner, the gradient of each product is summed over the devices by itself.
    """
    X = devices("batch", jax.sharding.get_abstract_mesh())

    def copies(variable):
        value, (_, *axes) = variable.get_value(), variable.get_metadata()["axes"]
        within = (None if axis == "embed" else axis for axis in axes)  # the batch has the mesh axis of `embed`
        return variable.replace(constrain(jnp.broadcast_to(value, (X, *value.shape)), "batch", *within))

    graph, adapter, frozen = nnx.split(layer, LoRAParam, ...)
    adapter = jax.tree.map(copies, adapter, is_leaf=lambda leaf: hasattr(leaf, "get_metadata"))
    return nnx.merge(graph, adapter, frozen)


class _Visible(NamedTuple):
    """What the S new tokens of each branch attend to, windows aside."""

    positions: Int[Array, "B N S"]
    suffix_positions: Int[Array, "B N M"]
    prefix_mask: Bool[Array, "B 1 1 P"]
    suffix_mask: Bool[Array, "B N S M"]


class Transformer(nnx.Module):
    """Decoder-only language model with stacked layers.

    Args:
      config: sizes and mathematics.
      lora: the adapter inside its linear layers; the default has none.
      dtype: of the frozen weights and the activations; adapters, softmax, norms and log-probabilities are float32.
      rngs: for a random network; weights are otherwise loaded over an abstract one (`hub.loading`).
      quantized: keep the weights of the layers' projections in eight bits (`models.quantization`).
    """

    def __init__(self, config: ModelConfig, lora: LoRAConfig, dtype, rngs: nnx.Rngs, quantized: bool = False):
        shape, axes = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        table = lambda: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype), axes=axes)
        self.config = config
        self.embed = table()
        self.layers = Layer(config, lora, dtype, rngs, quantized)
        self.final_norm = RMSNorm(config, (config.embed_dim,), (None,), dtype)
        self.head = None if config.tie_embeddings else table()

    @property
    def table(self) -> Float[Array, "V D"]:
        """The vocabulary projection, tied to the embedding or not."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
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
        dropout_key: Key[Array, ""] | None = None,
        return_hidden: bool = False,
    ) -> PrefixCache | tuple[PrefixCache, Float[Array, "B P D"]]:
        """Keys and values of right-padded prompts, each without its last token.

        Args:
          lengths: real tokens of each row of `prompt`; 0 is allowed (a prompt of one token).
          shared: the C tokens that all prompts begin with, as `prefill` of one row without padding returned them;
            `prompt` is then what follows, and the result holds both.
          remat: what the backward pass recomputes: 'none', 'layer' (all of a layer) or 'dots' (all but projections and
            attention's output).
          dropout_key: LoRA dropout, in training only.
          return_hidden: return the normed hidden states as well.
        """
        c = self.config
        B, P = prompt.shape
        C = 0 if shared is None else shared.k.shape[-1]
        positions = jnp.broadcast_to(C + jnp.arange(P), (B, P)).reshape(-1)

        def step(x, layer, angles, window, key, xs):
            number, prefix = xs
            # Without hidden states, only keys and values of the last layer are needed.
            needs_output = None if return_hidden else number < c.num_layers - 1
            return self._prompt_layer(x, layer, angles, window, key, prefix, (B, P), needs_output)

        xs = jnp.arange(c.num_layers), None if shared is None else (shared.k, shared.v)
        x, (k, v) = self._scan(step, self._embed(prompt), positions, xs, remat, dropout_key)
        cache = PrefixCache(k, v, C + lengths)
        return (cache, self.final_norm(x).reshape(B, P, -1)) if return_hidden else cache

    def extend(
        self,
        branches: Int[Array, "B N S"],
        cache: PrefixCache,
        *,
        remat: str = "none",
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B N S D"]:
        """Normed hidden states of N branches per prompt. A branch attends to the prompt and itself, never a sibling.

        Right padding of a branch needs no mask: causality hides it from every real token.
        """
        B, N, S = branches.shape
        start = jnp.broadcast_to(cache.lengths[:, None, None], (B, N, 1))
        positions = start + jnp.arange(S)
        suffix_mask = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, N, S, S))
        visible = _Visible(positions, positions, _prefix_mask(cache), suffix_mask)

        def step(x, layer, angles, window, key, prefix):
            keep_nothing = lambda k, v: (k, v, None)
            return self._branch_layer(x, layer, angles, window, key, prefix, visible, keep_nothing)

        prefix = cache.k, cache.v
        x, _ = self._scan(step, self._embed(branches), positions.reshape(-1), prefix, remat, dropout_key)
        return self.final_norm(x).reshape(B, N, S, -1)

    def prefill_and_extend(
        self,
        prompt: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        branches: Int[Array, "B N S"],
        shared: Int[Array, "C"] | None = None,
        *,
        remat: str = "none",
        dropout_key: Key[Array, ""] | None = None,
        return_hidden: bool = False,
        together: bool = False,
    ) -> tuple[Float[Array, "B N S D"], Float[Array, "B P D"] | None, Float[Array, "C D"] | None]:
        """`prefill` and `extend` in one scan over the layers, for training; the arguments are theirs.

        A layer of a branch needs no more of its prompt than the same layer's keys and values. So each layer's weights
        are gathered once for both (in fsdp), and in the backward pass once more; and no cache of all layers exists.

        Args:
          shared: the C tokens that all prompts begin with and that `prompt` leaves out.
          together: a prompt and its branches go through a layer's projections at once instead of one after the other.
            A third less is to be compiled, and weights are read once for both. Apart, as a CPU is faster, the last
            layer leaves out what of a prompt is not needed.

        Returns:
          The branches' normed hidden states, and with `return_hidden` those of `prompt` and of `shared`.
        """
        c = self.config
        (B, P), (_, N, S), C = prompt.shape, branches.shape, 0 if shared is None else shared.size
        start = jnp.broadcast_to((C + lengths)[:, None, None], (B, N, 1))
        branch_positions = start + jnp.arange(S)
        suffix_mask = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, N, S, S))
        prefix_mask = (jnp.arange(C + P) < (C + lengths)[:, None])[:, None, None]
        visible = _Visible(branch_positions, branch_positions, prefix_mask, suffix_mask)
        prompt_positions = jnp.broadcast_to(C + jnp.arange(P), (B, P))
        of_rows = prompt_positions, branch_positions.reshape(B, -1)
        if together:
            of_rows = (jnp.concatenate(of_rows, axis=1),)
        positions = jnp.arange(C), *(each.reshape(-1) for each in of_rows)
        mesh = jax.sharding.get_abstract_mesh()
        split = not mesh.empty and devices("batch", mesh) > 1 and B % devices("batch", mesh) == 0

        def step(carry, layer, angles, window, key, number):
            (x_shared, *x), prefix = carry, None
            keys = (None,) * 3 if key is None else jax.random.split(key, 3)
            of_shared, *of_pairs = angles
            needs_output = None if return_hidden else number < c.num_layers - 1
            if C:
                x_shared, prefix = self._prompt_layer(
                    x_shared, layer, of_shared, window, keys[2], None, (1, C), needs_output
                )
            if split:  # `shared` is not
                layer = _with_adapter_of_each_device(layer)
            if together:
                x = self._pair_layer(*x, layer, *of_pairs, window, keys[0], prefix, visible, P)
                return (x_shared, x), None
            (x_prompt, x_branches), (of_prompt, of_branches) = x, of_pairs
            x_prompt, prefix = self._prompt_layer(
                x_prompt, layer, of_prompt, window, keys[0], prefix, (B, P), needs_output
            )
            keep_nothing = lambda k, v: (k, v, None)
            x_branches, _ = self._branch_layer(
                x_branches, layer, of_branches, window, keys[1], prefix, visible, keep_nothing
            )
            return (x_shared, x_prompt, x_branches), None

        x = self._embed(prompt), self._embed(branches)
        if together:
            x = (_join(*x, B),)
        x = (self._embed(shared) if C else None), *x
        x, _ = self._scan(step, x, positions, jnp.arange(c.num_layers), remat, dropout_key, gather=True)
        x_shared, *x = x
        x_prompt, x_branches = _part(*x, B, P) if together else x
        hidden = self.final_norm(x_branches).reshape(B, N, S, -1)
        if not return_hidden:
            return hidden, None, None
        return hidden, self.final_norm(x_prompt).reshape(B, P, -1), self.final_norm(x_shared) if C else None

    def extend_cached(
        self, branches: Int[Array, "B N S"], real: Bool[Array, "B N S"], cache: PrefixCache, suffix: SuffixCache
    ) -> tuple[Float[Array, "B N S D"], SuffixCache]:
        """`extend` behind the tokens that each branch already has; the new ones are appended to its suffix cache.

        Args:
          real: False for padding, which takes an entry of the cache but no position and is never attended to.
          suffix: its S entries from `write_position` on are overwritten, and must not go over the end; donate it.
        """
        appended, positions, suffix_mask = suffix.append(real, cache.lengths)
        visible = _Visible(positions, appended.positions, _prefix_mask(cache), suffix_mask)

        def step(carry, layer, angles, window, key, xs):
            (x, all_k, all_v), (number, *prefix) = carry, xs

            def write(k, v):  # into the caches of all layers, which are carried so that they are updated in place
                k = jax.lax.dynamic_update_slice(all_k, k[None], (number, 0, 0, 0, 0, suffix.write_position))
                v = jax.lax.dynamic_update_slice(all_v, v[None], (number, 0, 0, 0, suffix.write_position, 0))
                of_layer = lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False)
                return of_layer(k), of_layer(v), (k, v)

            x, kept = self._branch_layer(x, layer, angles, window, key, prefix, visible, write)
            return (x, *kept), None

        xs = jnp.arange(self.config.num_layers), cache.k, cache.v
        carry = self._embed(branches), suffix.k, suffix.v
        (x, k, v), _ = self._scan(step, carry, positions.reshape(-1), xs)
        return self.final_norm(x).reshape(*branches.shape, -1), dataclasses.replace(appended, k=k, v=v)

    def extend_unstacked(
        self,
        layers: tuple[nnx.State, ...],
        branches: Int[Array, "B N S"],
        real: Bool[Array, "B N S"],
        cache: PrefixCache,
        suffix: SuffixCache,
    ) -> tuple[Float[Array, "B N S D"], SuffixCache]:
        """`extend_cached` with unstacked layers and caches, unrolled instead of scanned.

        A scan copies each layer's weights and caches before it uses them, which on some platforms takes a third of a
        decoding step (`distributed.mesh.prefers_unstacked_layers`).

        Args:
          layers: the layers' parameters, one state per layer (`unstack`); both caches are unstacked as well.
        """
        appended, positions, suffix_mask = suffix.append(real, cache.lengths)
        visible = _Visible(positions, appended.positions, _prefix_mask(cache), suffix_mask)

        def step(x, layer, angles, window, key, xs):
            *prefix, suffix_k, suffix_v = xs

            def write(k, v):
                k = jax.lax.dynamic_update_slice(suffix_k, k, (0, 0, 0, 0, suffix.write_position))
                v = jax.lax.dynamic_update_slice(suffix_v, v, (0, 0, 0, suffix.write_position, 0))
                return k, v, (k, v)

            return self._branch_layer(x, layer, angles, window, key, prefix, visible, write)

        xs = cache.k, cache.v, suffix.k, suffix.v
        x, kept = self._unroll(step, self._embed(branches), layers, positions.reshape(-1), xs)
        k, v = zip(*kept, strict=True)
        return self.final_norm(x).reshape(*branches.shape, -1), dataclasses.replace(appended, k=k, v=v)

    def empty_suffix_cache(self, batch: int, branches: int, length: int) -> SuffixCache:
        """An empty suffix cache of `length` tokens for each branch, stacked over the layers."""
        c, dtype = self.config, self.embed[...].dtype
        rows, flat = (c.num_layers, batch, _held_heads(c), branches), (batch, branches, length)
        empty = lambda *sizes: constrain(jnp.zeros(rows + sizes, dtype), None, "batch", "heads", None, None, None)
        return SuffixCache(
            empty(c.head_dim, length),
            empty(length, c.head_dim),
            jnp.zeros(flat, jnp.int32),
            jnp.zeros(flat, bool),
            jnp.int32(0),
        )

    def _prompt_layer(self, x, layer, angles, window, key, prefix, shape: tuple[int, int], needs_output):
        """A layer on the tokens of prompts [B, P], behind those of a shared prefix; with the joined keys and values."""

        def store(k, v):
            k, v = _prompt_keys(k, v, prefix, shape)
            return k, v, (k, v)

        attend = lambda q, k, v: self._attend_prompt(q, k, v, window, shape)
        return layer(x, angles, store=store, attend=attend, dropout_key=key, needs_output=needs_output)

    def _branch_layer(self, x, layer, angles, window, key, prefix, visible: _Visible, write):
        """A layer on the branches' tokens, its new keys and values stored by `write(k, v)`; what that keeps of them."""
        store = lambda k, v: write(*_branch_keys(k, v, visible))
        attend = lambda q, k, v: self._attend_branches(q, prefix, k, v, window, visible)
        return layer(x, angles, store=store, attend=attend, dropout_key=key)

    def _pair_layer(self, x, layer, angles, window, key, prefix, visible: _Visible, P: int):
        """A layer on prompts and their branches, joined by `_join`: each matmul is of the tokens of both."""
        B = visible.positions.shape[0]

        def store(k, v):
            (prompt_k, branch_k), (prompt_v, branch_v) = _part(k, B, P), _part(v, B, P)
            prompt = _prompt_keys(prompt_k, prompt_v, prefix, (B, P))
            return prompt, _branch_keys(branch_k, branch_v, visible), None

        def attend(q, of_prompt, of_branches):
            q_prompt, q_branches = _part(q, B, P)
            prompt = self._attend_prompt(q_prompt, *of_prompt, window, (B, P))
            return _join(prompt, self._attend_branches(q_branches, of_prompt, *of_branches, window, visible), B)

        return layer(x, angles, store=store, attend=attend, dropout_key=key)[0]

    def _attend_prompt(self, q, k, v, window, shape: tuple[int, int]):
        c, (B, P) = self.config, shape
        q = q.reshape(B, P, c.num_heads, c.head_dim)
        with jax.named_scope("prompt_attention"):
            out = prompt_attention(q, k, v, window=window, sliding_window=c.sliding_window, softcap=c.attention_softcap)
        return out.reshape(B * P, c.num_heads, c.head_dim)

    def _attend_branches(self, q, prefix, k, v, window, visible: _Visible):
        c, (B, N, S) = self.config, visible.positions.shape
        prefix_mask, suffix_mask = visible.prefix_mask, visible.suffix_mask
        if window is not None:
            oldest = visible.positions[..., None] - window  # the last position that is too far back
            prefix_mask = prefix_mask & (jnp.arange(prefix_mask.shape[-1]) > oldest)
            suffix_mask = suffix_mask & (visible.suffix_positions[:, :, None] > oldest)
        with jax.named_scope("branch_attention"):
            out = branch_attention(
                q.reshape(B, N, S, c.num_heads, c.head_dim),
                *prefix,
                k,
                v,
                prefix_mask=prefix_mask,
                suffix_mask=suffix_mask,
                softcap=c.attention_softcap,
            )
        return out.reshape(B * N * S, c.num_heads, c.head_dim)

    def _embed(self, tokens: Int[Array, "..."]) -> Float[Array, "T D"]:
        x = self.embed[...][tokens]
        if self.config.embed_scale != 1.0:
            x *= jnp.asarray(self.config.embed_scale, x.dtype)
        return constrain(x.reshape(-1, x.shape[-1]), "batch", None)

    def _angles(self, positions: Int[Array, "T"]) -> tuple[Angles, Angles]:
        """RoPE's angles in full-attention and in sliding layers."""
        c = self.config
        full = rope.tables(positions, rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        if c.rope_local_theta is None:
            return full, full
        return full, rope.tables(positions, rope.inverse_frequencies(c.head_dim, c.rope_local_theta))

    def _scan(self, step, carry, positions, xs, remat="none", dropout_key=None, gather=False):
        """Scan `step(carry, layer, angles, window, key, xs) -> (carry, out)` over the stacked layers.

        Layers that differ (sliding or full attention, and their RoPE base) differ in scanned data, not in code. The
        angles are those of `positions`, or a tuple of them where that is a tuple.

        Args:
          gather: gather each layer's weights in fsdp before it uses them, once in each pass. Left to the partitioner,
            they are gathered for each product, and activations move where it takes that to be cheaper.
        """
        c = self.config
        graph, layers = nnx.split(self.layers)
        several = isinstance(positions, tuple)
        tables = [self._angles(each) for each in (positions if several else (positions,))]
        slides = window = None
        if c.sliding_window is not None:
            slides = jnp.asarray(c.sliding_layers)
            window = jnp.where(slides, c.sliding_window, np.iinfo(np.int32).max)
        keys = None if dropout_key is None else jax.random.split(dropout_key, c.num_layers)
        mesh = jax.sharding.get_abstract_mesh()
        gather = gather and not mesh.empty and devices("embed", mesh) > 1

        def body(carry, scanned):
            layer, slides, window, key, xs = scanned
            if gather:
                layer = _gathered(layer)
            angles = tuple(
                full if local is full else jax.tree.map(lambda full, local: jnp.where(slides, local, full), full, local)
                for full, local in tables
            )
            return step(carry, nnx.merge(graph, layer), angles if several else angles[0], window, key, xs)

        wrap = _REMAT["gathered" if gather and remat == "none" else remat]
        return jax.lax.scan(wrap(body), carry, (layers, slides, window, keys, xs))

    def _unroll(self, step, x, layers, positions, xs):
        """Run `step` as `_scan` does, over unstacked layers; each of `xs` has an entry per layer."""
        c = self.config
        graph, _ = nnx.split(self.layers)
        full, local = self._angles(positions)

        @jax.jit  # so that layers that do the same are traced once
        def run(x, layer, angles, window, xs):
            return step(x, nnx.merge(graph, layer), angles, window, None, xs)

        kept = []
        for i, layer in enumerate(layers):
            slides = c.sliding_window is not None and c.sliding_layers[i]
            angles, window = (local, c.sliding_window) if slides else (full, None)
            x, out = run(x, layer, angles, window, tuple(a[i] for a in xs))
            kept.append(out)
        return x, kept


def _prompt_keys(k, v, prefix, shape: tuple[int, int]) -> tuple[Float[Array, "B K h P"], Float[Array, "B K P h"]]:
    """Keys and values [T, K, h] of prompts [B, P] as attention takes them, behind those of a shared prefix."""
    B, P = shape
    k, v = (a.reshape(B, P, *a.shape[1:]) for a in (k, v))
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    if prefix is not None:
        join = lambda first, rest, axis: jnp.concatenate([jnp.repeat(first, B, axis=0), rest], axis)
        k, v = join(prefix[0], k, 3), join(prefix[1], v, 2)
    return tuple(constrain(a, "batch", "heads", None, None) for a in (k, v))


def _branch_keys(k, v, visible: _Visible) -> tuple[Float[Array, "B K N h S"], Float[Array, "B K N S h"]]:
    """New keys and values [T, K, h] of branches as attention takes them."""
    k, v = (a.reshape(*visible.positions.shape, *a.shape[1:]) for a in (k, v))
    k, v = k.transpose(0, 3, 1, 4, 2), v.transpose(0, 3, 1, 2, 4)
    return tuple(constrain(a, "batch", "heads", None, None, None) for a in (k, v))


def _join(prompts: Array, branches: Array, B: int) -> Array:
    """Tokens of B prompts, each with those of its branches behind it."""
    rows = [part.reshape(B, -1, *part.shape[1:]) for part in (prompts, branches)]
    return jnp.concatenate(rows, axis=1).reshape(-1, *prompts.shape[1:])


def _part(joined: Array, B: int, P: int) -> tuple[Array, Array]:
    """What `_join` joined: the tokens of B prompts of P, and those of their branches."""
    rows = joined.reshape(B, -1, *joined.shape[1:])
    return tuple(part.reshape(-1, *joined.shape[1:]) for part in (rows[:, :P], rows[:, P:]))


def _held_heads(config: ModelConfig) -> int:
    """How many key/value heads are held under the ambient mesh."""
    return held_kv_heads(config.num_heads, config.num_kv_heads, devices("heads", jax.sharding.get_abstract_mesh()))


def _prefix_mask(cache: PrefixCache) -> Bool[Array, "B 1 1 P"]:
    return jnp.arange(cache.k[0].shape[-1]) < cache.lengths[:, None, None, None]
