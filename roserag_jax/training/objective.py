"""What training minimizes: the log-probabilities of pairs under the model, and the loss that is made of them.

Axes: B pairs, N = 2 branches (chosen, rejected), C shared-prefix tokens, P prompt tokens, S branch tokens, T tokens.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from roserag_jax.models.logprobs import token_logprobs
from roserag_jax.models.transformer import Transformer
from roserag_jax.training.losses import LOSSES, LossSpec, PairLogprobs
from roserag_jax.training.pair_loader import Batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, its hyper-parameters, and how its gradient is computed; the fields are options of `config.train`."""

    loss: str = "orpo"
    beta: float = 0.1
    gamma: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 1.0
    sft_span: str = "response"
    remat: str = "layer"
    dropout: bool = False

    @classmethod
    def from_options(cls, options, *, dropout: bool) -> "Objective":
        """The objective that `config.train` asks for; `dropout` says whether the adapter has any."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "dropout"]
        return cls(**{name: options[name] for name in names}, dropout=dropout)

    @property
    def spec(self) -> LossSpec:
        """The loss, from the registry."""
        return LOSSES[self.loss]

    @property
    def branches(self) -> int:
        """Branches of a prompt that the loss looks at: chosen and rejected, or chosen alone."""
        return 2 if self.spec.rejected else 1

    def __call__(self, logprobs: PairLogprobs) -> tuple[Float[Array, "B"], dict]:
        """Loss and loss terms of each pair."""
        return self.spec.fn(logprobs, **{name: getattr(self, name) for name in self.spec.hyperparameters})


def summed_logprobs(
    model: Transformer,
    batch: Batch,
    *,
    remat: str = "none",
    dropout_key=None,
    prompts: bool = False,
    together: bool = False,
) -> tuple[Float[Array, "B N"], Float[Array, "B"] | None]:
    """Summed log-probabilities of a batch's responses [B, N], and with `prompts` of its prompts [B].

    A prompt's first token is given, never predicted. The other arguments are those of `pair_losses`.
    """
    hidden, prompt_hidden, prefix_hidden = model.prefill_and_extend(
        batch.prompt,
        batch.prompt_lengths,
        batch.branches,
        batch.shared_prefix,
        remat=remat,
        dropout_key=dropout_key,
        return_hidden=prompts,
        together=together,
    )

    def logprobs(hidden, targets):
        return token_logprobs(hidden, targets, model.table, model.config.final_softcap)

    responses = _sum_real(logprobs(hidden, batch.targets), batch.response_lengths)
    if not prompts:
        return responses, None

    # What each position of `batch.prompt` predicts: the token after it, which for the last is what opens the branches.
    B, P = batch.prompt.shape
    opening = batch.branches[:, 0, :1]
    after = jnp.where(jnp.arange(1, P + 1) < batch.prompt_lengths[:, None], jnp.roll(batch.prompt, -1, 1), opening)
    prompt_logprobs = _sum_real(logprobs(prompt_hidden, after), batch.prompt_lengths)
    if batch.shared_prefix.size:  # its last token predicts each row's own first
        first = jnp.where(batch.prompt_lengths > 0, batch.prompt[:, 0], opening[:, 0])
        last = jnp.broadcast_to(prefix_hidden[-1], (B, prefix_hidden.shape[-1]))
        prompt_logprobs += logprobs(prefix_hidden[:-1], batch.shared_prefix[1:]).sum() + logprobs(last, first)
    return responses, prompt_logprobs


def _sum_real(values: Float[Array, "*rows T"], lengths: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Sums over each row's real tokens."""
    return jnp.where(jnp.arange(values.shape[-1]) < lengths[..., None], values, 0.0).sum(-1)


def total_weight(batch: Batch) -> Float[Array, ""]:
    """The number of a batch's real pairs, at least 1, so that means of a batch without any are zero."""
    return jnp.maximum(batch.weights.sum(), 1.0)


def mean_span(batch: Batch) -> Float[Array, ""]:
    """Mean number of predicted tokens of a pair's prompt and chosen response."""
    tokens = batch.shared_prefix.size + batch.prompt_lengths + batch.response_lengths[..., 0]
    return (tokens * batch.weights).sum() / total_weight(batch)


def pair_losses(
    model: Transformer,
    batch: Batch,
    objective: Objective,
    *,
    dropout_key=None,
    reference: Transformer | None = None,
    span: Float[Array, ""] | None = None,
    together: bool = False,
) -> tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]]:
    """Loss [B] of each pair and its metrics, each [B].

    Args:
      reference: the network without its adapter, for the losses that need it.
      span: `mean_span` of the whole batch where `batch` is a microbatch of it.
      together: a prompt and its branches go through each layer at once (`Transformer.prefill_and_extend`).
    """
    spec = objective.spec
    if not spec.rejected:  # its branch would only be computed and dropped
        batch = batch.chosen_only()
    with_prompts = spec.sft_span and objective.sft_span == "prompt+response"
    sums, prompt_logprobs = summed_logprobs(
        model,
        batch,
        remat=objective.remat,
        dropout_key=dropout_key,
        prompts=with_prompts,
        together=together,
    )
    means = sums / batch.response_lengths
    log_likelihood = means[:, 0]
    if with_prompts:  # as in TRL: a mean over the tokens of the batch, not over each pair's and then the pairs
        span = mean_span(batch) if span is None else span
        log_likelihood = (prompt_logprobs + sums[:, 0]) / span
    reduced = {"sum": sums, "mean": means}[spec.reduce]
    logprobs = PairLogprobs(*reduced.T, log_likelihood=log_likelihood)
    if spec.reference:
        reference_logprobs, _ = summed_logprobs(reference, batch, together=together)
        if spec.reduce == "mean":
            reference_logprobs /= batch.response_lengths
        sides = ("reference_chosen", "reference_rejected")[: objective.branches]
        logprobs = logprobs._replace(**dict(zip(sides, reference_logprobs.T, strict=True)))
    loss, terms = objective(logprobs)
    metrics = terms | {"chosen_logprob": means[:, 0]}
    if spec.rejected:
        metrics |= {
            "rejected_logprob": means[:, 1],
            "margin": means[:, 0] - means[:, 1],
            "accuracy": (terms["reward_margin"] > 0).astype(jnp.float32),
        }
    return loss, metrics
