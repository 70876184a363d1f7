"""Families of distributions fitted to confidences, how well they fit, and the margins that they predict.

A confidence is a log-probability, at most 0; what is fitted is its negative, the surprise, in nats. If the surprise of
correct and incorrect candidates were exponential with means m and w, and a question had n and k of them, the margin
(chosen minus rejected log-probability) would on average be w / k - m H(n) for the hardest pair, w - m for a random one
and w H(k) - m / n for the easiest, where H(n) = 1 + 1/2 + ... + 1/n: the expected minimum of n exponentials is their
mean over n, the maximum their mean times H(n).
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

_SMALLEST = 1e-6  # a surprise of 0 has no logarithm, which two of the families need


class Family(NamedTuple):
    """A family of distributions and its parameters that are not fitted."""

    distribution: Any
    fixed: dict[str, float]


FAMILIES = {
    "exponential": Family(stats.expon, {"loc": 0.0}),
    "gamma": Family(stats.gamma, {"loc": 0.0}),
    "weibull": Family(stats.weibull_min, {"loc": 0.0}),
    "normal": Family(stats.norm, {}),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A family fitted to surprises by maximum likelihood.

    Attributes:
      parameters: shapes, location and scale, in scipy's order.
      aic: Akaike's information criterion; the family with the lowest describes the data best for its size.
      p: of the Anderson-Darling statistic by parametric bootstrap; a small one says that the family is another.
    """

    family: str
    parameters: tuple[float, ...]
    aic: float
    p: float

    @property
    def frozen(self) -> Any:
        """The fitted distribution."""
        return FAMILIES[self.family].distribution(*self.parameters)


def _fitted(family: Family, values: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, family.distribution.fit(values, **{f"f{name}": v for name, v in family.fixed.items()})))


def _anderson_darling(distribution: Any, values: np.ndarray) -> float:
    values, n = np.sort(values), len(values)
    weights = 2 * np.arange(1, n + 1) - 1
    return float(-n - np.mean(weights * (distribution.logcdf(values) + distribution.logsf(values)[::-1])))


def fit_families(
    surprises: Sequence[float] | np.ndarray, resamples: int = 200, seed: int = 0, families: Sequence[str] = (*FAMILIES,)
) -> list[Fit]:
    """Fit families, the best (lowest AIC) first.

    Args:
      resamples: of the bootstrap: samples of the same size are drawn from the fitted distribution, and the family is
        fitted to each anew, so that the p-value allows for the parameters having been fitted.
    """
    values, fits = np.maximum(np.asarray(surprises, np.float64), _SMALLEST), []
    for number, name in enumerate(families):
        family, rng = FAMILIES[name], np.random.default_rng((seed, number))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # logarithms of tails that are 0
            parameters = _fitted(family, values)
            fitted = family.distribution(*parameters)
            statistic, larger = _anderson_darling(fitted, values), 0
            for _ in range(resamples):
                sample = np.maximum(fitted.rvs(len(values), random_state=rng), _SMALLEST if family.fixed else -np.inf)
                refitted = family.distribution(*_fitted(family, sample))
                larger += _anderson_darling(refitted, sample) >= statistic
            free = len(parameters) - len(family.fixed)
            aic = 2 * free - 2 * float(fitted.logpdf(values).sum())
        fits.append(Fit(name, parameters, aic, (larger + 1) / (resamples + 1)))
    return sorted(fits, key=lambda fit: fit.aic)


class Surprises(NamedTuple):
    """The surprises of a question's candidates that may be chosen, and of those that may be rejected."""

    right: np.ndarray
    wrong: np.ndarray


# The margin of a question's pair, by strategy; of a random one its expectation.
OBSERVED: dict[str, Callable[[Surprises], float]] = {
    "hard": lambda q: float(q.wrong.min() - q.right.max()),
    "random": lambda q: float(q.wrong.mean() - q.right.mean()),
    "easy": lambda q: float(q.wrong.max() - q.right.min()),
}


def observed_margins(questions: list[Surprises], strategy: str) -> np.ndarray:
    """The margin of each question's pair."""
    return np.array([OBSERVED[strategy](question) for question in questions])


def exponential_margin(right_mean: float, wrong_mean: float, counts: list[tuple[int, int]], strategy: str) -> float:
    """The margin that exponential surprises predict, averaged over questions.

    Args:
      counts: how many right and wrong candidates each question has.
    """
    harmonic = lambda n: float(np.sum(1 / np.arange(1, n + 1)))
    expected = {
        "hard": lambda n, k: wrong_mean / k - right_mean * harmonic(n),
        "random": lambda n, k: wrong_mean - right_mean,
        "easy": lambda n, k: wrong_mean * harmonic(k) - right_mean / n,
    }[strategy]
    return float(np.mean([expected(n, k) for n, k in counts]))


def simulated_margin(
    right: Any, wrong: Any, counts: list[tuple[int, int]], strategy: str, draws: int = 20_000, seed: int = 0
) -> float:
    """The margin that any two distributions predict, by drawing questions with these numbers of candidates.

    Args:
      right, wrong: scipy's frozen distributions of surprises.
    """
    rng, kinds = np.random.default_rng(seed), sorted(set(counts))
    total = 0.0
    for n, k in kinds:
        draw = lambda distribution, size: distribution.rvs((max(1, draws // len(kinds)), size), random_state=rng)
        a, b = draw(right, n), draw(wrong, k)
        margin = {
            "hard": lambda a, b: b.min(1) - a.max(1),
            "random": lambda a, b: b.mean(1) - a.mean(1),
            "easy": lambda a, b: b.max(1) - a.min(1),
        }[strategy](a, b)
        total += counts.count((n, k)) * float(margin.mean())
    return total / len(counts)
