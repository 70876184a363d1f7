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
from jaxtyping import Array, Int

from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.models.lora import LoRAParam
from roserag_jax.models.sharding import sharding, state_shardings
from roserag_jax.models.transformer import Transformer
from roserag_jax.models.weights import assemble
from roserag_jax.preference import losses
from roserag_jax.runtime.loader import Batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised; see `config.train`."""

    loss: str = "orpo"
    beta: float = 0.1
    gamma: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 1.0
    remat: str = "layer"
    dropout: bool = False


class TrainState(NamedTuple):
    """What a step changes: the adapter and its optimiser's state."""

    adapter: nnx.State
    optimizer: optax.OptState


def make_optimizer(learning_rate: float, steps: int, warmup: float, weight_decay: float, clip: float):
    """AdamW behind a global-norm clip, warmed up linearly and annealed by a cosine to zero; and its schedule."""
    warm = max(1, round(warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm + 1))
    adamw = optax.adamw(lambda count: schedule(count + 1), weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw), schedule


# Losses that compare with the reference model: the same network with its adapter off.
REFERENCE_LOSSES = ("dpo", "ipo")


def response_logprobs(model: Transformer, batch: Batch, shared=None, remat: str = "none", dropout_key=None):
    """Summed log-probabilities [B, N] of a batch's responses; the arguments are those of `pair_losses`."""
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    before = None
    if shared is not None and shared.size:
        before = model.prefill(shared[None], jnp.full(1, shared.size), remat=remat, dropout_key=keys[2])
    cache = model.prefill(batch.prompt, batch.prompt_lengths, before, remat=remat, dropout_key=keys[0])
    hidden = model.extend(batch.branches, cache, remat=remat, dropout_key=keys[1])
    logprobs = token_logprobs(hidden, batch.targets, model.table, model.config.final_softcap)
    said = jnp.arange(batch.targets.shape[-1]) < batch.response_lengths[..., None]
    return jnp.where(said, logprobs, 0.0).sum(-1)


def pair_losses(
    model: Transformer,
    batch: Batch,
    objective: Objective,
    shared: Int[Array, "C"] | None = None,
    dropout_key=None,
    reference: Transformer | None = None,
):
    """Loss [B] of each pair and its metrics, each [B].

    Args:
      shared: tokens that all prompts begin with and that `batch` leaves out; read once, with their gradient.
      reference: the network without its adapter, for the losses that need it.
    """
    o = objective
    if o.loss == "sft":  # the rejected branch would only be read and thrown away
        first = lambda a: a[:, :1]
        batch = batch._replace(
            branches=first(batch.branches), targets=first(batch.targets), response_lengths=first(batch.response_lengths)
        )
    sums = response_logprobs(model, batch, shared, o.remat, dropout_key)
    chosen, *rejected = (sums / batch.response_lengths).T
    if o.loss == "sft":
        loss, parts = losses.sft(chosen)
        return loss, parts | {"chosen_logprob": chosen}

    (rejected,) = rejected
    if o.loss in REFERENCE_LOSSES:
        of_reference = response_logprobs(reference, batch, shared)
    if o.loss == "orpo":
        loss, parts = losses.orpo(chosen, rejected, o.beta)
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
    ):
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
        step = functools.partial(
            _step,
            reference=nnx.split(assemble(model.config, self.base))[0] if objective.loss in REFERENCE_LOSSES else None,
            graph=self.graph,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
            seed=seed,
            shared=shared,
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere))

    def __call__(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict]:
        """One update; `state` is donated. Metrics are weighted means over the batch, as device scalars."""
        size = batch.weights.shape[0] // self.accumulate

        def place(array):
            array = array.reshape(self.accumulate, size, *array.shape[1:])
            axes = (None, "batch") + (None,) * (array.ndim - 2)
            return jax.device_put(array, sharding(array.shape, axes, self.mesh))

        with jax.set_mesh(self.mesh):
            return self._step(state, self.base, Batch(*map(place, batch)), step)


def _step(state, base, parts, step, *, reference, graph, objective, optimizer, schedule, seed, shared):
    total = parts.weights.sum()

    def weighted(adapter, part, index):
        key = None
        if objective.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), index)
        without = None if reference is None else nnx.merge(reference, base)
        loss, metrics = pair_losses(nnx.merge(graph, adapter, base), part, objective, shared, key, without)
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
    return TrainState(optax.apply_updates(state.adapter, updates), optimizer_state), metrics
