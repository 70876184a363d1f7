"""Losses: pure functions of response log-probabilities and lengths, in float32.

Axes: B pairs. A mean log-probability is a response's sum divided by its number of tokens, end-of-turn token included.
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


def orpo(chosen: Float[Array, "B"], rejected: Float[Array, "B"], beta: float):
    """Odds-ratio preference loss (ORPO, arXiv 2403.07691, equations 4 to 7).

    L = -chosen - beta * log sigmoid(log odds(chosen) - log odds(rejected)), of mean log-probabilities.

    Returns:
      The loss [B] of each pair and its parts, each [B]: 'nll', 'odds_loss' and 'log_odds_ratio'.
    """
    ratio = log_odds(chosen) - log_odds(rejected)
    odds_loss = -jax.nn.log_sigmoid(ratio)
    return -chosen + beta * odds_loss, {"nll": -chosen, "odds_loss": odds_loss, "log_odds_ratio": ratio}


def sft(chosen: Float[Array, "B"]):
    """Negative mean log-probability of the chosen response: supervised fine-tuning on accepted rationales.

    Returns:
      The loss [B] and its one part 'nll'.
    """
    return -chosen, {"nll": -chosen}
