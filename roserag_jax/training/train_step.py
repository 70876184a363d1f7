"""The training step: prompts once, two branches each, a loss of their log-probabilities, and AdamW on the adapter.

Axes: B pairs, A microbatches, C shared-prefix tokens, N = 2 branches (chosen, rejected), P prompt tokens, S branch
tokens, D model width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from roserag_jax.distributed.sharding import sharding, state_shardings
from roserag_jax.hub.loading import assemble
from roserag_jax.models.lora import LoRAParam
from roserag_jax.models.transformer import Transformer
from roserag_jax.training.objective import Objective, mean_span, pair_losses, total_weight
from roserag_jax.training.pair_loader import Batch


class TrainState(NamedTuple):
    """What a step changes: the adapter and its optimizer's state."""

    adapter: nnx.State
    optimizer: optax.OptState


class Optimizer(NamedTuple):
    """An optax transformation, and the learning rate of each step, counted from 1."""

    transformation: optax.GradientTransformation
    schedule: Callable


def adamw(
    learning_rate: float,
    *,
    steps: int,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_gradient_norm: float = 1.0,
) -> Optimizer:
    """AdamW behind a global-norm clip, warmed up linearly and annealed by a cosine.

    Args:
      learning_rate: the peak.
      steps: of the run; the rate would be zero one step after the last.
      warmup: fraction of the steps that warm up.
    """
    warm = max(1, round(warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(steps, warm) + 1)
    update = optax.adamw(lambda count: schedule(count + 1), weight_decay=weight_decay)
    return Optimizer(optax.chain(optax.clip_by_global_norm(max_gradient_norm), update), schedule)


class TrainStep:
    """The jitted, sharded step of one network and optimizer.

    Nothing is computed before the first call, so the network may also be made of shapes (`jax.ShapeDtypeStruct`): then
    `lower` compiles the step for devices that are not there.

    Args:
      model: the network with its adapter; frozen parameters are inputs of the step, never donated.
      objective: what is minimized.
      optimizer: how, and with which learning rates.
      accumulate: microbatches of a step; gradients equal those of the whole batch, weights included.
      seed: of dropout.
      skip_nonfinite: leave the state as it is where the loss, the gradient or the new state is non-finite (NaN or Inf).
      together: a prompt and its branches go through each layer at once (`Transformer.prefill_and_extend`); by default
        where that is faster, which is not on a CPU.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        optimizer: Optimizer,
        objective: Objective | None = None,
        accumulate: int = 1,
        seed: int = 0,
        skip_nonfinite: bool = False,
        together: bool | None = None,
    ):
        self.model, self.mesh, self.accumulate = model, mesh, accumulate
        self.objective = objective = objective or Objective()
        graph, self.adapter, self.base = nnx.split(model, LoRAParam, ...)
        self._init = lambda adapter: TrainState(
            # The step donates its state, and must not take the caller's adapter with it.
            jax.tree.map(jnp.copy, adapter),
            optimizer.transformation.init(adapter),
        )
        abstract = jax.eval_shape(self._init, self.adapter)
        self._shardings = state_shardings(abstract, mesh)
        self.abstract_state = _abstract(abstract, self._shardings)
        network = {
            "reference": nnx.split(assemble(model.config, self.base))[0] if objective.spec.reference else None,
            "graph": graph,
            "objective": objective,
            "together": mesh.devices.flat[0].platform != "cpu" if together is None else together,
        }
        step = functools.partial(
            _step,
            **network,
            optimizer=optimizer,
            seed=seed,
            skip_nonfinite=skip_nonfinite,
        )
        replicated = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, replicated))
        self._evaluate = jax.jit(functools.partial(_evaluate, **network), out_shardings=replicated)

    def init(self) -> TrainState:
        """The state before the first step: a copy of the network's adapter, and the optimizer's zeros."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._init, out_shardings=self._shardings)(self.adapter)

    def __call__(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict]:
        """One update; `state` is donated. Metrics are weighted means over the batch, as device scalars."""
        with jax.set_mesh(self.mesh):
            return self._step(state, self.base, self._place(self._microbatches(batch), None, "batch"), step)

    def evaluate(self, adapter: nnx.State, batch: Batch) -> dict:
        """Loss and metrics of a batch, without dropout or update."""
        with jax.set_mesh(self.mesh):
            return self._evaluate(adapter, self.base, self._place(batch, "batch"))

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step for batches of this shape, lowered and ready to compile; arrays or shapes will do everywhere."""
        microbatches = jax.eval_shape(self._microbatches, batch)
        batched = self._batch_shardings(microbatches, None, "batch")
        base = _abstract(self.base, state_shardings(self.base, self.mesh))
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.abstract_state, base, _abstract(microbatches, batched), 0)

    def memory(self, batch: Batch) -> int:
        """Bytes that the compiled step works with on each device, beside its arguments and results."""
        return self.lower(batch).compile().memory_analysis().temp_size_in_bytes

    def _microbatches(self, batch: Batch) -> Batch:
        """A batch [B, ...] as microbatches [A, B / A, ...] behind the same shared prefix."""
        split = lambda leaf: leaf.reshape(self.accumulate, -1, *leaf.shape[1:])
        rows = jax.tree.map(split, batch._replace(shared_prefix=None))
        return rows._replace(shared_prefix=batch.shared_prefix)

    def _batch_shardings(self, batch: Batch, *axes: str | None) -> Batch:
        """The shardings of a batch whose rows' leading dimensions carry the logical names `axes`."""
        of = lambda leaf: sharding(leaf.shape, axes + (None,) * (leaf.ndim - len(axes)), self.mesh)
        rows = jax.tree.map(of, batch._replace(shared_prefix=None))
        return rows._replace(shared_prefix=NamedSharding(self.mesh, PartitionSpec()))

    def _place(self, batch: Batch, *axes: str | None) -> Batch:
        """A batch on the mesh; every process has made the same one and hands over the rows of its own devices."""
        place = lambda array, where: jax.make_array_from_callback(array.shape, where, np.asarray(array).__getitem__)
        return jax.tree.map(place, batch, self._batch_shardings(batch, *axes))

    def flops(self, batch: Batch) -> float:
        """FLOPs that the mathematics of a step takes, whatever rematerialization repeats: the numerator of MFU.

        A frozen matrix costs a matmul forward and one backward (to its input), an adapter's one more (to itself);
        padding and rows that only fill the batch count for nothing.
        """
        c, C = self.model.config, len(batch.shared_prefix)
        real, spec = batch.weights > 0, self.objective.spec
        prompts = batch.prompt_lengths[real].astype(float)
        responses = batch.response_lengths[real, : self.objective.branches].astype(float)
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
        reference = forward + head if spec.reference else 0
        attention = 4 * keys * c.num_layers * c.num_heads * c.head_dim
        return 2 * forward + attention + 6 * tokens * adapter + 2 * head + reference


def _abstract(tree, shardings):
    """The shapes of a tree's arrays, with their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def _step(
    state: TrainState,
    base: nnx.State,
    microbatches: Batch,
    step: int | Int[Array, ""],
    *,
    reference,
    graph,
    objective: Objective,
    together: bool,
    optimizer: Optimizer,
    seed: int,
    skip_nonfinite: bool,
) -> tuple[TrainState, dict]:
    """One update of the state, and its metrics."""
    total, span = total_weight(microbatches), mean_span(microbatches)
    shared_prefix = microbatches.shared_prefix

    def weighted_loss(adapter, microbatch, index):
        key = None
        if objective.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), index)
        loss, metrics = pair_losses(
            nnx.merge(graph, adapter, base),
            microbatch._replace(shared_prefix=shared_prefix),
            objective,
            dropout_key=key,
            reference=None if reference is None else nnx.merge(reference, base),
            span=span,
            together=together,
        )
        mean = lambda value: (value * microbatch.weights).sum() / total
        return mean(loss), {"loss": mean(loss)} | jax.tree.map(mean, metrics)

    def gradient(microbatch, index):
        return jax.grad(weighted_loss, has_aux=True)(state.adapter, microbatch, index)

    gradients, metrics = _sum_over_microbatches(gradient, microbatches._replace(shared_prefix=None))
    updates, optimizer_state = optimizer.transformation.update(gradients, state.optimizer, state.adapter)
    new = TrainState(optax.apply_updates(state.adapter, updates), optimizer_state)
    metrics |= {"gradient_norm": optax.global_norm(gradients), "learning_rate": optimizer.schedule(step + 1)}
    finite = _all_finite((metrics["loss"], metrics["gradient_norm"], new))  # the norm overflows before the gradient
    metrics["finite"] = finite
    if skip_nonfinite:
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return new, metrics


def _sum_over_microbatches(gradient: Callable, microbatches: Batch):
    """The sum of `gradient(microbatch, index)` over all microbatches; the first outside the loop."""
    result = gradient(jax.tree.map(lambda leaf: leaf[0], microbatches), 0)
    if (count := microbatches.weights.shape[0]) > 1:
        rest = (jax.tree.map(lambda leaf: leaf[1:], microbatches), jnp.arange(1, count))
        add = lambda carry, one: (jax.tree.map(jnp.add, carry, gradient(*one)), None)
        result, _ = jax.lax.scan(add, result, rest)
    return result


def _all_finite(tree) -> jax.Array:
    """Whether no number of a tree is NaN or Inf."""
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def _evaluate(adapter, base, batch, *, reference, graph, objective, together) -> dict:
    """Weighted means over a batch of its loss and metrics."""
    loss, metrics = pair_losses(
        nnx.merge(graph, adapter, base),
        batch,
        objective,
        reference=None if reference is None else nnx.merge(reference, base),
        together=together,
    )
    mean = lambda value: (value * batch.weights).sum() / total_weight(batch)
    return jax.tree.map(mean, {"loss": loss} | metrics)
