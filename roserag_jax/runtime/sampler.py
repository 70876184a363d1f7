"""Sampling: every branch of a batch of prompts decoded in one on-device loop.

Axes: B batch, N branches, P prompt, S opening length, T new tokens, V vocabulary, D model.
"""

import dataclasses
import functools
import os
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from roserag_jax.models.config import ModelConfig
from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.models.sharding import sharding
from roserag_jax.models.transformer import PrefixCache, Transformer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature (0 is greedy), then the tokens that top-k, top-p and min-p all leave.

    top_k 0, top_p 1 and min_p 0 each keep the whole vocabulary; top-p counts its share within what top-k leaves, as
    transformers does.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class Decoded(NamedTuple):
    """What `Engine.decode` returns, on the host.

    tokens [B, N, T] are padded past `lengths` [B, N]; the stop token is not among them. logprobs [B, N, T] are at
    temperature 1 over the whole vocabulary. `finished` [B, N] is False where a branch ran into the limit.
    opening_logprobs [B, N, S - 1] are those of the opening's tokens after its first.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    opening_logprobs: np.ndarray


def question_key(question_id: str) -> int:
    """A stable 32-bit number for a question, so that its samples depend on no batch, order or host."""
    return zlib.crc32(question_id.encode())


class Engine:
    """A network on its mesh, ready to read prompts, decode branches and score responses.

    Every method takes host arrays whose batch is fixed by the caller; each shape compiles once.
    """

    def __init__(self, model: Transformer, mesh: Mesh, stop_ids: tuple[int, ...], pad_id: int, seed: int = 0):
        self.graph, self.state = nnx.split(model)
        self.vocab_size = model.config.vocab_size
        self.mesh, self.stop_ids, self.pad_id, self.seed = mesh, tuple(stop_ids), pad_id, seed

    def _place(self, *arrays):
        batch = lambda a: sharding(a.shape, ("batch",) + (None,) * (a.ndim - 1), self.mesh)
        return [jax.device_put(a, batch(a)) for a in map(np.asarray, arrays)]

    def read_shared(self, prompts: list[list[int]]) -> PrefixCache | None:
        """Read what all prompts of a stage begin with (instructions, worked examples); None where it is short."""
        C = shared_length(prompts)
        return self._read([prompts[0][:C]], C, None) if C else None

    def prefill(
        self, prompts: list[list[int]], shared: PrefixCache | None = None, length: int | None = None
    ) -> PrefixCache:
        """Read prompts (all but their last token); an empty one only fills the batch.

        Args:
          shared: their common beginning, read before.
          length: padded length of what follows it; by default the bucket of the longest.
        """
        C = 0 if shared is None else shared.v.shape[3]
        rest = [p[C:-1] for p in prompts]
        return self._read(rest, length or bucket(max(map(len, rest))), shared)

    def rewind(self, cache: PrefixCache, lengths: list[int]) -> PrefixCache:
        """The same prompts as if read only so far: what comes next is then up to the openings of the branches."""
        return dataclasses.replace(cache, lengths=self._place(np.array(lengths, np.int32))[0])

    def _read(self, rows, length, shared):
        tokens, lengths = pad(rows, length, self.pad_id)
        with jax.set_mesh(self.mesh):
            return _prefill(self.graph, self.state, *self._place(tokens, lengths), shared)

    def score(self, cache: PrefixCache, prompts, responses: list[list[list[int]]], bucket: int) -> np.ndarray:
        """Log-probabilities [B, N, bucket] of N responses (tokens, stop token included) per prompt; 0 past each end."""
        N = len(responses[0])
        flat = [r for row in responses for r in row]
        targets, lengths = pad(flat, bucket, self.pad_id)
        first = np.repeat([[p[-1]] for p in prompts], N, axis=0)
        branches = np.concatenate([first, targets[:, :-1]], axis=1)
        shape = (len(prompts), N, bucket)
        with jax.set_mesh(self.mesh):
            placed = self._place(branches.reshape(shape), targets.reshape(shape))
            logprobs = np.asarray(_score(self.graph, self.state, cache, *placed))
        return np.where(np.arange(bucket) < lengths.reshape(shape[:2])[..., None], logprobs, 0.0)

    def decode(
        self,
        cache: PrefixCache,
        openings: list[list[list[int]]],
        bucket: int,
        question_ids: list[str],
        first_sample: int,
        sampling: Sampling | list[Sampling],
        max_new: int,
        stop_ids: tuple[int, ...] = (),
    ) -> Decoded:
        """Go on from N openings per prompt, each the prompt's last token and what the branch has said so far.

        Args:
          bucket: openings are padded to this length.
          sampling: for all prompts, or one for each; a change of it compiles nothing.
          first_sample: the branches draw with the keys of samples `first_sample` to `first_sample + N - 1`.
          stop_ids: tokens that end a branch besides the model's own.
        """
        B, N = len(openings), len(openings[0])
        tokens, lengths = pad([o for row in openings for o in row], bucket, self.pad_id)
        ids = np.array([question_key(q) for q in question_ids], np.uint32)
        stops = np.zeros(self.vocab_size, bool)
        stops[list(self.stop_ids + stop_ids)] = True
        of_prompt = [sampling] * B if isinstance(sampling, Sampling) else sampling
        knobs = np.repeat(np.array([dataclasses.astuple(s) for s in of_prompt], np.float32), N, axis=0)
        with jax.set_mesh(self.mesh):
            tokens, lengths, ids = self._place(tokens.reshape(B, N, bucket), lengths.reshape(B, N), ids)
            keys = (jax.random.key(self.seed), ids, np.uint32(first_sample))
            out = _decode(self.graph, self.state, cache, tokens, lengths, keys, knobs, stops, max_new=max_new)
            return Decoded(*map(np.asarray, out))


def bucket(length: int) -> int:
    """The padded length for `length` tokens: few sizes, so few compilations, and at most a quarter of it padding."""
    for step, limit in ((16, 128), (64, 512), (128, 1024)):
        if length <= limit:
            return max(-(-length // step), 1) * step
    return -(-length // 256) * 256


def decoding_bytes(config: ModelConfig, itemsize: int, prompt: int, branches: int, slots: int) -> int:
    """Memory that one question takes while its branches are decoded, weights aside.

    Two prompts of `prompt` tokens (plain and guided), `slots` own tokens of each branch, and three arrays of logits.
    """
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return token * (2 * prompt + branches * slots) + 3 * 4 * branches * config.vocab_size


def shared_length(prompts: list[list[int]]) -> int:
    """How many tokens all prompts (the empty ones aside) begin with; 0 where they are too few to be read apart.

    The last token of a prompt opens its branches and is never among them.
    """
    prompts = [p for p in prompts if p]
    common = min(len(os.path.commonprefix(prompts)), min(map(len, prompts), default=0) - 1)
    return common if common >= 32 else 0


def pad(rows: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [rows, length] and the rows' lengths."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(graph, state, tokens, lengths, shared):
    return nnx.merge(graph, state).prefill(tokens, lengths, shared)


@functools.partial(jax.jit, static_argnums=0)
def _score(graph, state, cache, branches, targets):
    model = nnx.merge(graph, state)
    return token_logprobs(model.extend(branches, cache), targets, model.table, model.config.final_softcap)


def _invert(weights: Float[Array, "R C"], uniform: Float[Array, "R"]) -> tuple[Array, Array]:
    """The entry at quantile `uniform` of each row's weights, and the quantile that is left over inside that entry."""
    total = jnp.cumsum(weights, axis=-1)
    wanted = uniform * total[:, -1]
    # Entries of weight zero are stepped over even when rounding puts the quantile on their edge.
    reached = (total > wanted[:, None]) & (weights > 0)
    entry = jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
    weight, upper = (jnp.take_along_axis(a, entry[:, None], axis=1)[:, 0] for a in (weights, total))
    return entry, jnp.clip((wanted - (upper - weight)) / weight, 0.0, 1.0)


def _threshold(logits: Float[Array, "R V"], weights: Float[Array, "R V"], wanted: Float[Array, "R"]) -> Array:
    """The largest logit so that the tokens from it upwards weigh `wanted` together, found by bisection: no sorting."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.where(logits >= middle[:, None], weights, 0).sum(-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    return jax.lax.fori_loop(0, 32, halve, (logits.min(-1), logits.max(-1)))[0]


def draw(logits: Float[Array, "R V"], keys, knobs: Float[Array, "R 4"]) -> Array:
    """One token per row: greedy at temperature 0, else a draw by inverting the distribution of the tokens that stay.

    One uniform number per row is enough (a Gumbel draw would need one per row and vocabulary entry). The inverse is
    taken in two levels, over blocks of the vocabulary and then inside the block, where float32 sums stay exact enough.

    Args:
      knobs: `Sampling`'s fields of each row. Top-p (the nucleus, arXiv 1904.09751), top-k and min-p (arXiv 2407.01082)
        each come down to the lowest logit that stays; a search that no row asks for is not run.
    """
    temperature, top_p, top_k, min_p = knobs.T

    def kept(scaled):
        """Scaled logits with what is cut at minus infinity."""
        everything = jnp.full(len(scaled), -jnp.inf)
        V, top = scaled.shape[1], scaled.max(-1)
        of_k = lambda: jnp.where(top_k > 0, _threshold(scaled, jnp.ones_like(scaled), jnp.minimum(top_k, V)), -jnp.inf)
        lowest = jax.lax.cond((top_k > 0).any(), of_k, lambda: everything)

        def of_p():
            weights = jnp.where(scaled >= lowest[:, None], jnp.exp(scaled - top[:, None]), 0)
            return jnp.where(top_p < 1, _threshold(scaled, weights, top_p * weights.sum(-1)), -jnp.inf)

        lowest = jnp.maximum(lowest, jax.lax.cond((top_p < 1).any(), of_p, lambda: everything))
        lowest = jnp.maximum(lowest, jnp.where(min_p > 0, top + jnp.log(min_p), -jnp.inf))
        return jnp.where(scaled >= lowest[:, None], scaled, -jnp.inf)

    def sampled():
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        cut = (top_p < 1) | (top_k > 0) | (min_p > 0)
        weights = jax.nn.softmax(jax.lax.cond(cut.any(), kept, lambda x: x, scaled), axis=-1)
        R, V = weights.shape
        width = 256
        blocks = jnp.pad(weights, ((0, 0), (0, -V % width))).reshape(R, -1, width)
        uniform = jax.vmap(jax.random.uniform)(keys)
        block, rest = _invert(blocks.sum(-1), uniform)
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        return jnp.where(temperature > 0, block * width + _invert(inside, rest)[0], jnp.argmax(logits, axis=-1))

    return jax.lax.cond((temperature > 0).any(), sampled, lambda: jnp.argmax(logits, axis=-1))


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_new")
def _decode(graph, state, cache, openings, lengths, keys, knobs, stops, *, max_new):
    model = nnx.merge(graph, state)
    B, N, S = openings.shape
    seed, ids, first_sample = keys
    fold = lambda i, n: jax.random.fold_in(jax.random.fold_in(seed, i), n)
    keys = jax.vmap(lambda i: jax.vmap(lambda n: fold(i, n))(first_sample + jnp.arange(N, dtype=jnp.uint32)))(ids)
    keys = keys.reshape(-1)

    real = jnp.arange(S) < lengths[..., None]
    hidden, own = model.extend_cached(openings, real, cache, model.own_cache(B, N, S + max_new - 1))
    opening_logprobs = token_logprobs(hidden[:, :, :-1], openings[:, :, 1:], model.table, model.config.final_softcap)
    last = jnp.take_along_axis(hidden, (lengths - 1)[..., None, None], axis=2)[:, :, 0]

    def choose(hidden, step):
        logits = model.logits(hidden).reshape(B * N, -1)
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        token = draw(logits, step_keys, knobs)
        logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        return token.reshape(B, N).astype(jnp.int32), logprob.reshape(B, N)

    def record(carry, hidden):
        step, own, tokens, logprobs, counts, finished, _ = carry
        token, logprob = choose(hidden, step)
        stopped = stops[token] & ~finished
        says = ~finished & ~stopped
        tokens = tokens.at[:, :, step].set(jnp.where(says, token, tokens[:, :, step]))
        logprobs = logprobs.at[:, :, step].set(jnp.where(says, logprob, 0.0))
        return step + 1, own, tokens, logprobs, counts + says, finished | stopped, token

    def advance(carry):
        own, finished, token = carry[1], carry[5], carry[6]
        hidden, own = model.extend_cached(token[..., None], ~finished[..., None], cache, own)
        return record((carry[0], own, *carry[2:]), hidden[:, :, 0])

    flat = (B, N)
    carry = (
        jnp.int32(0),
        own,
        jnp.zeros((B, N, max_new), jnp.int32),
        jnp.zeros((B, N, max_new)),
        jnp.zeros(flat, jnp.int32),
        lengths == 0,  # an empty opening marks a row that only fills the batch
        jnp.zeros(flat, jnp.int32),
    )
    carry = record(carry, last)
    carry = jax.lax.while_loop(lambda c: (c[0] < max_new) & ~c[5].all(), advance, carry)
    _, _, tokens, logprobs, counts, finished, _ = carry
    return tokens, logprobs, counts, finished, opening_logprobs
