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
from roserag_jax.preference import losses
from roserag_jax.runtime.loader import Batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised; see `config.train`."""

    loss: str = "orpo"
    beta: float = 0.1
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


def pair_losses(
    model: Transformer, batch: Batch, objective: Objective, shared: Int[Array, "C"] | None = None, dropout_key=None
):
    """Loss [B] of each pair and its metrics, each [B].

    Args:
      shared: tokens that all prompts begin with and that `batch` leaves out; read once, with their gradient.
    """
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    before = None
    if shared is not None and shared.size:
        length = jnp.full(1, shared.size)
        before = model.prefill(shared[None], length, remat=objective.remat, dropout_key=keys[2])
    cache = model.prefill(batch.prompt, batch.prompt_lengths, before, remat=objective.remat, dropout_key=keys[0])
    one = objective.loss == "sft"
    branches, targets, lengths = batch.branches, batch.targets, batch.response_lengths
    if one:  # the rejected branch would only be read and thrown away
        branches, targets, lengths = branches[:, :1], targets[:, :1], lengths[:, :1]
    hidden = model.extend(branches, cache, remat=objective.remat, dropout_key=keys[1])
    logprobs = token_logprobs(hidden, targets, model.table, model.config.final_softcap)
    logprobs = jnp.where(jnp.arange(targets.shape[-1]) < lengths[..., None], logprobs, 0.0).sum(-1)
    means = logprobs / lengths
    likelihood = means[:, 0]
    if one:
        loss, parts = losses.sft(likelihood)
        return loss, parts | {"chosen_logprob": likelihood}
    loss, parts = losses.orpo(means[:, 0], means[:, 1], objective.beta)
    margin = means[:, 0] - means[:, 1]
    return loss, parts | {
        "chosen_logprob": means[:, 0],
        "rejected_logprob": means[:, 1],
        "margin": margin,
        "accuracy": (margin > 0).astype(jnp.float32),
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


def _step(state, base, parts, step, *, graph, objective, optimizer, schedule, seed, shared):
    total = parts.weights.sum()

    def weighted(adapter, part, index):
        key = None
        if objective.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), index)
        loss, metrics = pair_losses(nnx.merge(graph, adapter, base), part, objective, shared, key)
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
