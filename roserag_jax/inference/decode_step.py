"""The decoder's device side: forced prefixes put into slots, and decode steps of all slots.

`decode_step` is one step, from top to bottom; `decode_chunk` runs up to `CHUNK` of them in one program. What is run
when is decided on the host, in `scheduler`.

Axes: B slots, X devices that slots are split over, W slots of a device that are served together, N branches, P prompt,
S tokens of a branch (new ones, or its forced prefix), M suffix-cache length, R rows (B * N or X * W), V vocabulary,
L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from roserag_jax.inference.kv_cache import put_entries, put_rings, take_slots
from roserag_jax.inference.sampling import SamplingParams, sample_tokens
from roserag_jax.models.cache import PrefixCache, SuffixCache
from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.models.pytree import HostArray, pytree_dataclass

CHUNK = 16  # steps between two polls of the host, if no slots finish before


@pytree_dataclass
class DecodeState:
    """What a decode step changes, for every branch of every slot.

    Args:
      cache: the branches' own keys and values, a ring of M positions that all branches write at the same place.
      last_token: the token that the next step puts in; its keys and values are not in the cache yet.
      tokens: new tokens, the first `num_tokens` of S; the stop token is not among them.
      logprobs: of `tokens`, at temperature 1 over the whole vocabulary.
      num_tokens: how many new tokens there are; also the step of the branch's random key.
      active: whether the branch is still decoding.
      stopped: whether it ended with a stop token or by its stop function, not at its limit.
    """

    cache: SuffixCache
    last_token: Int[HostArray, "B N"]
    tokens: Int[HostArray, "B N S"]
    logprobs: Float[HostArray, "B N S"]
    num_tokens: Int[HostArray, "B N"]
    active: Bool[HostArray, "B N"]
    stopped: Bool[HostArray, "B N"]


@pytree_dataclass
class RequestParams:
    """What the running request of each slot asks for. All of it is traced: no change of it compiles anything.

    Args:
      prompt_length: how many tokens of the prefix cache the slot's branches see.
      max_new_tokens: the most new tokens of a branch.
      sampling: sampling parameters, each of shape [B].
      question_seed: the request's question, from `question_seed`.
      first_sample: the sample number of the slot's first branch.
      use_extra_stop_ids: the row of the stop mask in use: 0 has the model's own stop token ids, 1 the extra ones too.
    """

    prompt_length: Int[HostArray, "B"]
    max_new_tokens: Int[HostArray, "B"]
    sampling: SamplingParams
    question_seed: UInt[HostArray, "B"]
    first_sample: UInt[HostArray, "B"]
    use_extra_stop_ids: Int[HostArray, "B"]


def branch_keys(params: RequestParams, seed: jax.Array, branches: int) -> jax.Array:
    """Random keys [R]: a branch's is a function of (seed, question, sample), whatever slot it is in."""
    samples = params.first_sample[:, None] + jnp.arange(branches, dtype=jnp.uint32)
    fold = lambda question, sample: jax.random.fold_in(jax.random.fold_in(seed, question), sample)
    return jax.vmap(jax.vmap(fold, (None, 0)))(params.question_seed, samples).reshape(-1)


def decode_step(
    model, layers, prompts: PrefixCache, state: DecodeState, params: RequestParams, keys, stop_mask: Bool[Array, "2 V"]
) -> DecodeState:
    """Decode one token of every active branch.

    1. Put each branch's last token through the network. It attends to its slot's prompt and to its own tokens; its keys
       and values are written into the suffix cache. Branches that are not active compute too, but are never seen.
    2. Sample the next token from the logits with the branch's key folded with its number of tokens, so that the draw
       depends on (seed, question, sample, step) and on nothing else.
    3. A stop token ends the branch and is dropped; any other is appended with its log-probability.
    4. A branch that has its `max_new_tokens` is no longer active.
    """
    B, N, S = state.tokens.shape
    active, num_tokens = state.active, state.num_tokens
    extend = model.extend_cached if layers is None else functools.partial(model.extend_unstacked, layers)
    hidden, cache = extend(state.last_token[..., None], active[..., None], prompts, state.cache)
    logits = model.logits(hidden).reshape(B * N, -1)

    step_keys = jax.vmap(jax.random.fold_in)(keys, num_tokens.reshape(-1))
    of_branch = jax.tree.map(lambda of_slot: jnp.repeat(of_slot, N), params.sampling)
    token = sample_tokens(logits, step_keys, of_branch)
    logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    token, logprob = token.reshape(B, N).astype(jnp.int32), logprob.reshape(B, N)

    stopped = active & stop_mask[params.use_extra_stop_ids[:, None], token]
    appends = active & ~stopped
    position = appends[..., None] & (jnp.arange(S) == num_tokens[..., None])
    num_tokens = num_tokens + appends
    return DecodeState(
        cache=cache,
        last_token=token,
        tokens=jnp.where(position, token[..., None], state.tokens),
        logprobs=jnp.where(position, logprob[..., None], state.logprobs),
        num_tokens=num_tokens,
        active=appends & (num_tokens < params.max_new_tokens[:, None]),
        stopped=state.stopped | stopped,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def decode_chunk(network, weights, layers, prompts, state: DecodeState, params: RequestParams, stop_mask, seed):
    """Run up to `CHUNK` decode steps of all slots; fewer once an eighth of the busy ones has finished, or one.

    Args:
      network, weights, layers: the network, and its layers' parameters unstacked if the caches are.
      prompts: keys and values of the prefix cache.

    Returns:
      The new state, and a copy of what the host reads of it, while the state itself goes into the next program.
    """
    model, layers = network.model(weights), layers and network.layers(layers)
    keys = branch_keys(params, seed, state.tokens.shape[1])
    prompts = PrefixCache(*prompts, params.prompt_length)
    busy = state.active.any(-1).sum()

    def goes_on(carry):
        step, state = carry
        still_busy = state.active.any(-1).sum()
        return (step < CHUNK) & (still_busy > 0) & (busy - still_busy < jnp.maximum(busy // 8, 1))

    def advance(carry):
        step, state = carry
        return step + 1, decode_step(model, layers, prompts, state, params, keys, stop_mask)

    state = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), state))[1]
    return state, (state.active, state.stopped, state.num_tokens, state.tokens, state.logprobs)


@functools.partial(jax.jit, donate_argnums=0)
def update_slots(
    state: DecodeState,
    started: Bool[Array, "B"],
    empty_suffix: Bool[Array, "B"],
    last_token: Int[Array, "B N"],
    active: Bool[Array, "B N"],
    ended: Bool[Array, "B N"],
) -> DecodeState:
    """Start the branches of slots, and end branches by their stop function.

    Args:
      started: the slots that start.
      empty_suffix: those of them without forced prefixes, whose suffix cache is emptied.
      last_token, active: of the slots that start.
      ended: the branches that end, in other slots.
    """
    of_slot = started[:, None]
    used = state.cache.used & ~empty_suffix[:, None, None]
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, used=used),
        last_token=jnp.where(of_slot, last_token, state.last_token),
        num_tokens=jnp.where(of_slot, 0, state.num_tokens),
        active=jnp.where(of_slot, active, state.active & ~ended),
        stopped=~of_slot & (state.stopped | ended),
    )


def extend_slots(
    network,
    weights,
    prompts: tuple,
    suffix: SuffixCache,
    tokens: Int[HostArray, "R N S"],
    targets: Int[HostArray, "R N S"],
    lengths: Int[HostArray, "R N"],
    prompt_length: Int[HostArray, "R"],
    slots: Int[HostArray, "R"],
    served: Bool[HostArray, "R"],
) -> tuple[SuffixCache, Float[Array, "R N S"]]:
    """Put forced prefixes through the network, into the suffix cache of W slots of each device, which is donated.

    They end just before the position that the next step writes.

    Args:
      prompts: keys and values of the prefix cache.
      tokens, lengths: the forced prefixes without their last tokens, right-padded, and their lengths.
      targets: the tokens that follow `tokens`.
      prompt_length: how many prompt tokens the branches see.
      slots, served: the slot of each row, counted within its device, and whether the row holds forced prefixes.

    Returns:
      The suffix cache, and the log-probabilities of `targets`.
    """
    cache = PrefixCache(*take_slots(prompts, slots), prompt_length)
    M = suffix.used.shape[-1]
    new, entries, first, logprobs = _extend(network, weights, cache, tokens, targets, lengths, suffix.write_position, M)
    k, v = put_rings((suffix.k, suffix.v), new, slots, served, first)
    positions, used = put_entries((suffix.positions, suffix.used), entries, slots, served)
    return SuffixCache(k, v, positions, used, suffix.write_position), logprobs


@functools.partial(jax.jit, static_argnums=(0, 7))
def _extend(network, weights, cache: PrefixCache, tokens, targets, lengths, write_position, M: int):
    """Keys and values of forced prefixes, positions and use of the entries of their rings, where these begin, and the
    log-probabilities of `targets`."""
    model = network.model(weights)
    R, N, S = tokens.shape
    cache = dataclasses.replace(cache, k=_stacked(cache.k), v=_stacked(cache.v))
    empty = model.empty_suffix_cache(R, N, S)
    hidden, new = model.extend_cached(tokens, jnp.arange(S) < lengths[..., None], cache, empty)
    logprobs = token_logprobs(hidden, targets, model.table, model.config.final_softcap)

    first = (write_position - lengths.max(-1)) % M
    number = (jnp.arange(M) - first[:, None]) % M  # of the token in each entry of the ring
    used = number[:, None] < lengths[..., None]
    positions = jnp.broadcast_to((cache.lengths[:, None] + number)[:, None], used.shape)
    return (new.k, new.v), (positions, used), first, logprobs


def _stacked(layers: jax.Array | tuple) -> jax.Array:
    return jnp.stack(layers) if isinstance(layers, tuple) else layers
