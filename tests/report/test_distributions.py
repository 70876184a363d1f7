"""Families of distributions are told apart, and predicted margins are those of drawn questions."""

import numpy as np
import pytest
from scipy import stats

from roserag_jax.report import distributions
from roserag_jax.report.distributions import Surprises

TRUE = {
    "exponential": stats.expon(scale=0.7),
    "gamma": stats.gamma(4.0, scale=0.2),
    "weibull": stats.weibull_min(3.0, scale=1.5),
    "normal": stats.norm(3.0, 0.5),
}
# Families that a sample of 400 cannot be of.
OTHERS = {
    "exponential": {"normal"},
    "gamma": {"exponential", "normal"},
    "weibull": {"exponential", "gamma"},
    "normal": {"exponential"},
}


@pytest.mark.parametrize("family", TRUE)
def test_families_are_told_apart(family):
    """The true family is not rejected and is as good as any; families that differ are rejected."""
    values = TRUE[family].rvs(400, random_state=np.random.default_rng(3))
    fits = {fit.family: fit for fit in distributions.fit_families(values, resamples=39)}
    assert fits[family].p > 0.05
    assert fits[family].aic <= min(fit.aic for fit in fits.values()) + 2.5
    for other in OTHERS[family]:
        assert fits[other].p <= 0.05 and fits[other].aic > fits[family].aic + 5
    if family != "exponential":
        mean = fits[family].frozen.mean()
        assert mean == pytest.approx(TRUE[family].mean(), rel=0.1)


def test_bootstrap_allows_for_the_fitted_parameters():
    """Over many samples of the family itself, p-values are spread evenly: one in five is below 0.2."""
    rng = np.random.default_rng(0)
    draws = [rng.exponential(1.0, 30) for _ in range(60)]
    fits = [distributions.fit_families(draw, 19, families=["exponential"])[0] for draw in draws]
    assert 0.08 < np.mean([fit.p <= 0.2 for fit in fits]) < 0.35


@pytest.mark.parametrize("strategy", distributions.OBSERVED)
def test_exponential_margin_equals_monte_carlo(strategy):
    """Questions with different numbers of candidates, drawn here; and the general simulation says the same."""
    rng, counts = np.random.default_rng(1), [(1, 4), (3, 2), (6, 1), (3, 2)]
    drawn = []
    for n, k in counts * 12_000:
        question = Surprises(rng.exponential(0.8, n), rng.exponential(1.3, k))
        drawn.append(distributions.OBSERVED[strategy](question))
    expected = distributions.exponential_margin(0.8, 1.3, counts, strategy)
    assert np.mean(drawn) == pytest.approx(expected, abs=0.03)
    simulated = distributions.simulated_margin(
        stats.expon(scale=0.8), stats.expon(scale=1.3), counts, strategy, draws=120_000
    )
    assert simulated == pytest.approx(expected, abs=0.03)
