"""The training step: prompts once, two branches each, a loss of their log-probabilities, and AdamW on the adapter.

Axes: B pairs, A accumulated parts, C shared beginning, N = 2 branches (chosen, rejected), P prompt, S response,
D model.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from roserag_jax.distributed.sharding import sharding, state_shardings
from roserag_jax.hub.loading import assemble
from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.models.lora import LoRAParam
from roserag_jax.models.transformer import Transformer
from roserag_jax.training import losses
from roserag_jax.training.pair_loader import Batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised; see `config.train`."""

    loss: str = "orpo"
    beta: float = 0.1
    gamma: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 1.0
    sft_span: str = "response"
    remat: str = "layer"
    dropout: bool = False


class TrainState(NamedTuple):
    """What a step changes: the adapter and its optimiser's state."""

    adapter: nnx.State
    optimizer: optax.OptState


def make_optimizer(learning_rate: float, steps: int, warmup: float, weight_decay: float, clip: float):
    """AdamW behind a global-norm clip, warmed up linearly and annealed by a cosine, and its schedule by step from 1.

    The rate would be zero one step after the last.
    """
    warm = max(1, round(warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm) + 1)
    adamw = optax.adamw(lambda count: schedule(count + 1), weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw), schedule


# Losses that compare with the reference model: the same network with its adapter off.
REFERENCE_LOSSES = ("dpo", "ipo")


def summed_logprobs(
    model: Transformer, batch: Batch, shared=None, remat: str = "none", dropout_key=None, of_prompts: bool = False
):
    """Summed log-probabilities of a batch's responses [B, N], and with `of_prompts` of its prompts [B].

    A prompt's first token is given, never predicted. The other arguments are those of `pair_losses`.
    """
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    before, C = None, 0 if shared is None else shared.size
    read = functools.partial(model.prefill, remat=remat, hidden=of_prompts)
    if C:
        before = read(shared[None], jnp.full(1, C), dropout_key=keys[2])
        before, of_shared = before if of_prompts else (before, None)
    cache = read(batch.prompt, batch.prompt_lengths, before, dropout_key=keys[0])
    cache, of_rest = cache if of_prompts else (cache, None)
    hidden = model.extend(batch.branches, cache, remat=remat, dropout_key=keys[1])
    logprobs = lambda *at: token_logprobs(*at, model.table, model.config.final_softcap)
    within = lambda values, lengths: jnp.where(jnp.arange(values.shape[-1]) < lengths[..., None], values, 0.0).sum(-1)
    responses = within(logprobs(hidden, batch.targets), batch.response_lengths)
    if not of_prompts:
        return responses, None

    # What each position of `batch.prompt` predicts: the token after it, which for the last is what opens the branches.
    B, P = batch.prompt.shape
    opening = batch.branches[:, 0, :1]
    after = jnp.where(jnp.arange(1, P + 1) < batch.prompt_lengths[:, None], jnp.roll(batch.prompt, -1, 1), opening)
    prompts = within(logprobs(of_rest, after), batch.prompt_lengths)
    if C:  # every row's prompt begins with these tokens; the last of them predicts each row's own next one
        first = jnp.where(batch.prompt_lengths > 0, batch.prompt[:, 0], opening[:, 0])
        last = jnp.broadcast_to(of_shared[:, -1], (B, of_shared.shape[-1]))
        prompts += logprobs(of_shared[0, :-1], shared[1:]).sum() + logprobs(last, first)
    return responses, prompts


def mean_span(batch: Batch, shared=None) -> jax.Array:
    """Mean number of predicted tokens of a pair's prompt and chosen response."""
    tokens = (0 if shared is None else shared.size) + batch.prompt_lengths + batch.response_lengths[..., 0]
    return (tokens * batch.weights).sum() / batch.weights.sum()


def pair_losses(
    model: Transformer,
    batch: Batch,
    objective: Objective,
    shared: Int[Array, "C"] | None = None,
    dropout_key=None,
    reference: Transformer | None = None,
    span: Float[Array, ""] | None = None,
):
    """Loss [B] of each pair and its metrics, each [B].

    Args:
      shared: tokens that all prompts begin with and that `batch` leaves out; read once, with their gradient.
      reference: the network without its adapter, for the losses that need it.
      span: `mean_span` of the whole batch where `batch` is only a part of it.
    """
    o = objective
    whole = o.sft_span == "prompt+response"
    if o.loss == "sft":  # the rejected branch would only be read and thrown away
        first = lambda a: a[:, :1]
        batch = batch._replace(
            branches=first(batch.branches), targets=first(batch.targets), response_lengths=first(batch.response_lengths)
        )
    sums, of_prompts = summed_logprobs(model, batch, shared, o.remat, dropout_key, whole)
    chosen, *rejected = (sums / batch.response_lengths).T
    # Over prompt and response as in TRL: a mean over the tokens of the batch, not over each pair's and then the pairs.
    likelihood = chosen
    if whole:
        likelihood = (of_prompts + sums[:, 0]) / (mean_span(batch, shared) if span is None else span)
    if o.loss == "sft":
        loss, parts = losses.sft(likelihood)
        return loss, parts | {"chosen_logprob": chosen}

    (rejected,) = rejected
    if o.loss in REFERENCE_LOSSES:
        of_reference, _ = summed_logprobs(reference, batch, shared)
    if o.loss == "orpo":
        loss, parts = losses.orpo(chosen, rejected, o.beta, likelihood)
    elif o.loss == "dpo":
        loss, parts = losses.dpo(*sums.T, *of_reference.T, o.beta, o.label_smoothing)
    elif o.loss == "ipo":
        loss, parts = losses.ipo(chosen, rejected, *(of_reference / batch.response_lengths).T, o.beta)
    elif o.loss == "simpo":
        loss, parts = losses.simpo(chosen, rejected, o.beta, o.gamma, o.label_smoothing)
    else:
        loss, parts = losses.cpo(*sums.T, chosen, o.beta, o.sft_weight, o.label_smoothing)
    return loss, parts | {
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
        "margin": chosen - rejected,
        "accuracy": (parts["reward_margin"] > 0).astype(jnp.float32),
    }


class TrainStep:
    """The jitted, sharded step of one network and optimiser.

    Args:
      model: the network with its adapter; frozen parameters are inputs of the step, never donated.
      accumulate: parts that a batch is worked through in; gradients equal the whole batch's, weights included.
      shared: tokens that all prompts begin with and that batches leave out.
      skip_nonfinite: leave the state as it is where the loss or the gradient is no number.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        objective: Objective,
        optimizer,
        schedule,
        accumulate: int,
        seed: int,
        shared: Int[np.ndarray, "C"] | None = None,
        skip_nonfinite: bool = False,
    ):
        self.model, self.objective = model, objective
        self.shared_length = 0 if shared is None else len(shared)
        self.graph, adapter, self.base = nnx.split(model, LoRAParam, ...)
        self.mesh, self.accumulate = mesh, accumulate
        abstract = TrainState(adapter, jax.eval_shape(optimizer.init, adapter))
        self.shardings = state_shardings(abstract, mesh)
        with jax.set_mesh(mesh):
            # The step donates its state, and must not take the caller's adapter with it.
            start = jax.jit(
                lambda a: TrainState(jax.tree.map(jnp.copy, a), optimizer.init(a)), out_shardings=self.shardings
            )
            self.initial = start(adapter)
        network = {
            "reference": nnx.split(assemble(model.config, self.base))[0]
            if objective.loss in REFERENCE_LOSSES
            else None,
            "graph": self.graph,
            "objective": objective,
        }
        step = functools.partial(
            _step,
            **network,
            optimizer=optimizer,
            schedule=schedule,
            seed=seed,
            shared=shared,
            skip_nonfinite=skip_nonfinite,
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere))
        self._evaluate = jax.jit(functools.partial(_evaluate, **network), out_shardings=everywhere)

    def __call__(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict]:
        """One update; `state` is donated. Metrics are weighted means over the batch, as device scalars."""
        with jax.set_mesh(self.mesh):
            return self._step(state, self.base, self._parts(batch), step)

    def memory(self, batch: Batch) -> int:
        """Bytes that the compiled step works with on each device, its arguments and results aside."""
        with jax.set_mesh(self.mesh):
            compiled = self._step.lower(self.initial, self.base, self._parts(batch), 0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def _parts(self, batch: Batch) -> Batch:
        size = batch.weights.shape[0] // self.accumulate
        return self._place(Batch(*(a.reshape(self.accumulate, size, *a.shape[1:]) for a in batch)), None, "batch")

    def evaluate(self, adapter: nnx.State, batch: Batch, shared: Int[np.ndarray, "C"]) -> dict:
        """Loss and metrics of a batch, without dropout or update; `shared` is what its prompts begin with."""
        with jax.set_mesh(self.mesh):
            return self._evaluate(adapter, self.base, self._place(batch, "batch"), shared)

    def _place(self, batch: Batch, *axes) -> Batch:
        """A batch on the mesh; every process has made the same one and hands over the rows of its own devices."""

        def place(array):
            layout = sharding(array.shape, axes + (None,) * (array.ndim - len(axes)), self.mesh)
            return jax.make_array_from_callback(array.shape, layout, array.__getitem__)

        return Batch(*map(place, batch))

    def flops(self, batch: Batch) -> float:
        """Operations that the mathematics of a step takes, whatever a policy makes again: the F of the utilisation.

        A frozen matrix costs a product forward and one backward (to its input), an adapter's one more (to itself);
        padding and rows that only fill the batch count for nothing.
        """
        c, C = self.model.config, self.shared_length
        real, branches = batch.weights > 0, 1 if self.objective.loss == "sft" else 2
        prompts, responses = batch.prompt_lengths[real].astype(float), batch.response_lengths[real, :branches]
        size = lambda filter: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, filter)))
        adapter, frozen = size(LoRAParam), size(nnx.PathContains("weight"))
        tokens = C + prompts.sum() + responses.sum()
        sums = lambda n: n * (n + 1) / 2  # keys that n tokens see of themselves
        keys = (
            sums(C) + (prompts * C + sums(prompts)).sum() + ((C + prompts)[:, None] * responses + sums(responses)).sum()
        )
        projected = responses.sum() + (C + prompts.sum() if self.objective.sft_span != "response" else 0)
        forward = 2 * tokens * frozen + 4 * keys * c.num_layers * c.num_heads * c.head_dim
        head = 2 * projected * c.embed_dim * c.vocab_size
        again = forward + head if self.objective.loss in REFERENCE_LOSSES else 0
        attention = 4 * keys * c.num_layers * c.num_heads * c.head_dim
        return 2 * forward + attention + 6 * tokens * adapter + 2 * head + again


def _step(state, base, parts, step, *, reference, graph, objective, optimizer, schedule, seed, shared, skip_nonfinite):
    total, span = parts.weights.sum(), mean_span(parts, shared)

    def weighted(adapter, part, index):
        key = None
        if objective.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), index)
        without = None if reference is None else nnx.merge(reference, base)
        loss, metrics = pair_losses(nnx.merge(graph, adapter, base), part, objective, shared, key, without, span)
        mean = lambda value: (value * part.weights).sum() / total
        return mean(loss), {"loss": mean(loss)} | jax.tree.map(mean, metrics)

    gradient = lambda *part: jax.grad(weighted, has_aux=True)(state.adapter, *part)
    first = (jax.tree.map(lambda a: a[0], parts), 0)
    total_of_parts = gradient(*first)
    if (count := parts.weights.shape[0]) > 1:
        rest = (jax.tree.map(lambda a: a[1:], parts), jnp.arange(1, count))
        add = lambda carry, part: (jax.tree.map(jnp.add, carry, gradient(*part)), None)
        total_of_parts, _ = jax.lax.scan(add, total_of_parts, rest)
    gradients, metrics = total_of_parts
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.adapter)
    metrics |= {"gradient_norm": optax.global_norm(gradients), "learning_rate": schedule(step + 1)}
    new = TrainState(optax.apply_updates(state.adapter, updates), optimizer_state)
    if skip_nonfinite:
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return new, metrics


def _evaluate(adapter, base, batch, shared, *, reference, graph, objective):
    without = None if reference is None else nnx.merge(reference, base)
    loss, metrics = pair_losses(nnx.merge(graph, adapter, base), batch, objective, shared, reference=without)
    mean = lambda value: (value * batch.weights).sum() / batch.weights.sum()
    return jax.tree.map(mean, {"loss": loss} | metrics)
