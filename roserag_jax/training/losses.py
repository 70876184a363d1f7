"""Losses: pure functions of response log-probabilities, in float32.

Axes: B pairs. A mean log-probability is a response's sum divided by its number of tokens, end-of-turn token included.
Every loss returns its value [B] per pair and its parts, each [B]; 'reward_margin' is what it pushes up: the implicit
reward of chosen over that of rejected.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def _logistic(logits: Float[Array, "B"], smoothing: float) -> Float[Array, "B"]:
    """-log sigmoid(logits), with the share `smoothing` of the pairs taken to be labelled the wrong way round."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(logits) - smoothing * jax.nn.log_sigmoid(-logits)


def orpo(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], beta: float, likelihood: Float[Array, "B"] | None = None
):
    """Odds-ratio preference loss (ORPO, arXiv 2403.07691, equations 4 to 7).

    L = -likelihood - beta * log sigmoid(log odds(chosen) - log odds(rejected)), of mean log-probabilities.

    Args:
      likelihood: what the first term raises; the chosen response's mean log-probability unless given.
    """
    likelihood = chosen if likelihood is None else likelihood
    ratio = log_odds(chosen) - log_odds(rejected)
    odds_loss = -jax.nn.log_sigmoid(ratio)
    parts = {"nll": -likelihood, "odds_loss": odds_loss, "log_odds_ratio": ratio}
    return -likelihood + beta * odds_loss, parts | {"reward_margin": beta * (chosen - rejected)}


def sft(likelihood: Float[Array, "B"]):
    """Negative mean log-probability of the chosen response: supervised fine-tuning on accepted rationales."""
    return -likelihood, {"nll": -likelihood}


def dpo(chosen, rejected, reference_chosen, reference_rejected, beta: float, smoothing: float = 0.0):
    """Direct preference optimisation (arXiv 2305.18290, equation 7), of summed log-probabilities [B].

    L = -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))); with label smoothing, the
    conservative form of Mitchell (2023), 'A note on DPO with noisy preferences'.
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return _logistic(margin, smoothing), {"reward_margin": margin}


def ipo(chosen, rejected, reference_chosen, reference_rejected, beta: float):
    """Identity preference optimisation (arXiv 2310.12036, equation 17), of mean log-probabilities [B].

    L = (((chosen - reference_chosen) - (rejected - reference_rejected)) - 1 / (2 * beta))^2. Means, not sums, as the
    authors advise for text (and as TRL does).
    """
    ratio = (chosen - reference_chosen) - (rejected - reference_rejected)
    return jnp.square(ratio - 1 / (2 * beta)), {"reward_margin": beta * ratio}


def simpo(chosen: Float[Array, "B"], rejected: Float[Array, "B"], beta: float, gamma: float, smoothing: float = 0.0):
    """Simple preference optimisation (arXiv 2405.14734, equation 6), of mean log-probabilities.

    L = -log sigmoid(beta * (chosen - rejected) - gamma).
    """
    margin = beta * (chosen - rejected)
    return _logistic(margin - gamma, smoothing), {"reward_margin": margin}


def cpo(chosen, rejected, chosen_mean, beta: float, sft_weight: float = 1.0, smoothing: float = 0.0):
    """Contrastive preference optimisation (arXiv 2401.08417, equations 3 and 5), of summed log-probabilities [B].

    L = -log sigmoid(beta * (chosen - rejected)) - sft_weight * chosen_mean.
    """
    margin = beta * (chosen - rejected)
    return _logistic(margin, smoothing) - sft_weight * chosen_mean, {"nll": -chosen_mean, "reward_margin": margin}
