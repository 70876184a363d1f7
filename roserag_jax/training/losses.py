"""Losses: pure functions of log-probabilities, in float32, and the registry that everything else derives from.

To add a loss, write one function here under `@loss(...)`. Its name becomes a choice of `config.train.loss`, its
hyper-parameters are passed from the options of the same names and refused with losses that lack them, the training step
computes the log-probabilities that it asks for, and `--options` prints the first line of its docstring.

Axes: B pairs. A response's log-probability includes its end-of-turn token. Every loss returns its value [B] per pair
and its terms, each [B], for the log; 'reward_margin' is what a preference loss pushes up: the implicit reward of chosen
over that of rejected. A pair's value is a function of that pair alone: a batch is split into microbatches and over
devices, and its last rows may only fill it, so a mean over B inside a loss (KTO's estimate of the KL divergence, say)
would depend on all three.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class PairLogprobs(NamedTuple):
    """Log-probabilities of a batch of pairs, summed or averaged over a response's tokens as the loss's `reduce` says.

    Attributes:
      chosen: under the trained model.
      rejected: under the trained model; None for a loss with `rejected=False`.
      reference_chosen: under the reference model (the base model); None for a loss with `reference=False`.
      reference_rejected: under the reference model.
      log_likelihood: what a supervised term raises: mean log-probability per token of the chosen response, or of prompt
        and response (`config.train.sft_span`).
    """

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"] | None = None
    reference_chosen: Float[Array, "B"] | None = None
    reference_rejected: Float[Array, "B"] | None = None
    log_likelihood: Float[Array, "B"] | None = None


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """A loss and what it needs.

    Attributes:
      fn: `fn(logprobs, **hyperparameters)` returns the loss [B] and its terms {name: [B]}.
      reduce: over a response's tokens: 'sum' or 'mean' of their log-probabilities.
      reference: whether it compares with the reference model, the same network with its adapter off.
      rejected: whether it looks at the rejected response.
      hyperparameters: options of `config.train` that it takes, by name.
      sft_span: whether `config.train.sft_span` applies to its supervised term.
      zero_beta: whether beta weights a term and may be 0; elsewhere it scales the reward and must be positive.
    """

    fn: Callable
    reduce: Literal["sum", "mean"]
    reference: bool = False
    rejected: bool = True
    hyperparameters: tuple[str, ...] = ()
    sft_span: bool = False
    zero_beta: bool = False

    @property
    def summary(self) -> str:
        """One line about the loss."""
        return inspect.getdoc(self.fn).splitlines()[0].rstrip(".")

    @property
    def options(self) -> tuple[str, ...]:
        """The options of `config.train` that have an effect with this loss."""
        return self.hyperparameters + ("sft_span",) * self.sft_span


LOSSES: dict[str, LossSpec] = {}


def loss(**needs) -> Callable:
    """Register the decorated function as the loss of its name; the arguments are `LossSpec`'s."""

    def register(fn):
        LOSSES[fn.__name__] = LossSpec(fn, **needs)
        return fn

    return register


def describe() -> str:
    """All losses with what each is, for the help of `config.train.loss`."""
    return "; ".join(f"{name}: {spec.summary}" for name, spec in LOSSES.items())


def users(option: str) -> str:
    """The losses with which an option of `config.train` has an effect, as text."""
    return ", ".join(name for name, spec in LOSSES.items() if option in spec.options)


def faults(train, defaults: dict) -> Iterator[tuple[str, str]]:
    """The options of `config.train` that do not go with its loss, each with what is wrong.

    Args:
      train: the options by name.
      defaults: their defaults, by name.
    """
    name, spec = train["loss"], LOSSES[train["loss"]]
    for option in sorted({option for other in LOSSES.values() for option in other.options}):
        if train[option] != defaults[option] and option not in spec.options:
            yield option, f"config.train.loss={name!r} has no such term (it is for {users(option)})"
    if "beta" in spec.hyperparameters and not spec.zero_beta and train["beta"] == 0:
        yield "beta", f"config.train.loss={name!r} is scaled by it: must be more than 0"


_LOG_HALF = -0.6931471805599453


def log1mexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler 2012, 'Accurately computing log(1 - exp(-|a|))').

    Each branch is given arguments that are safe for it, because a `where` passes NaN gradients of the branch not taken.
    """
    x = jnp.minimum(x, -1e-9)
    near = x > _LOG_HALF
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )


def log_odds(mean_logprob: Float[Array, "B"]) -> Float[Array, "B"]:
    """log(p / (1 - p)) of a probability given by its logarithm."""
    return mean_logprob - log1mexp(mean_logprob)


def _log_ratio_margin(logprobs: PairLogprobs) -> Float[Array, "B"]:
    """Log-ratio to the reference model of chosen minus that of rejected."""
    chosen = logprobs.chosen - logprobs.reference_chosen
    return chosen - (logprobs.rejected - logprobs.reference_rejected)


def _logistic(logits: Float[Array, "B"], label_smoothing: float) -> Float[Array, "B"]:
    """-log sigmoid(logits), where a fraction `label_smoothing` of the pairs is assumed to have flipped labels."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


@loss(reduce="mean", hyperparameters=("beta",), sft_span=True, zero_beta=True)
def orpo(logprobs: PairLogprobs, beta: float):
    """Odds-ratio preference optimization (arXiv 2403.07691, equations 4 to 7).

    L = -log_likelihood - beta * log sigmoid(log odds(chosen) - log odds(rejected)).
    """
    ratio = log_odds(logprobs.chosen) - log_odds(logprobs.rejected)
    nll, odds_loss = -logprobs.log_likelihood, -jax.nn.log_sigmoid(ratio)
    margin = beta * (logprobs.chosen - logprobs.rejected)
    return nll + beta * odds_loss, {
        "nll": nll,
        "odds_loss": odds_loss,
        "log_odds_ratio": ratio,
        "reward_margin": margin,
    }


@loss(reduce="mean", rejected=False, sft_span=True)
def sft(logprobs: PairLogprobs):
    """Supervised fine-tuning on the chosen responses: negative mean log-likelihood."""
    return -logprobs.log_likelihood, {"nll": -logprobs.log_likelihood}


@loss(reduce="sum", reference=True, hyperparameters=("beta", "label_smoothing"))
def dpo(logprobs: PairLogprobs, beta: float, label_smoothing: float = 0.0):
    """Direct preference optimization (arXiv 2305.18290, equation 7).

    L = -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))); with label smoothing, the
    conservative form of Mitchell (2023), 'A note on DPO with noisy preferences'.
    """
    margin = beta * _log_ratio_margin(logprobs)
    return _logistic(margin, label_smoothing), {"reward_margin": margin}


@loss(reduce="mean", reference=True, hyperparameters=("beta",))
def ipo(logprobs: PairLogprobs, beta: float):
    """Identity preference optimization (arXiv 2310.12036, equation 17).

    L = (((chosen - reference_chosen) - (rejected - reference_rejected)) - 1 / (2 * beta))^2. Means, not sums, as the
    authors advise for text (and as TRL does).
    """
    ratio = _log_ratio_margin(logprobs)
    return jnp.square(ratio - 1 / (2 * beta)), {"reward_margin": beta * ratio}


@loss(reduce="mean", hyperparameters=("beta", "gamma", "label_smoothing"))
def simpo(logprobs: PairLogprobs, beta: float, gamma: float, label_smoothing: float = 0.0):
    """Simple preference optimization (arXiv 2405.14734, equation 6).

    L = -log sigmoid(beta * (chosen - rejected) - gamma).
    """
    margin = beta * (logprobs.chosen - logprobs.rejected)
    return _logistic(margin - gamma, label_smoothing), {"reward_margin": margin}


@loss(reduce="sum", hyperparameters=("beta", "sft_weight", "label_smoothing"))
def cpo(logprobs: PairLogprobs, beta: float, sft_weight: float = 1.0, label_smoothing: float = 0.0):
    """Contrastive preference optimization (arXiv 2401.08417, equations 3 and 5).

    L = -log sigmoid(beta * (chosen - rejected)) - sft_weight * log_likelihood.
    """
    margin = beta * (logprobs.chosen - logprobs.rejected)
    nll = -logprobs.log_likelihood
    return _logistic(margin, label_smoothing) + sft_weight * nll, {"nll": nll, "reward_margin": margin}
