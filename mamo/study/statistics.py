"""Means, intervals and paired differences of a handful of seeds (Student 1908)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its confidence interval `low` to `high`; of a single value the interval is not known (NaN)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Estimate:
    """The mean of independent values and its t interval: mean +- t * s / sqrt(n), s with n - 1.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to take the mean of")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(values: Mapping[int, float], against: Mapping[int, float]) -> Estimate | None:
    """`values` minus `against`, seed by seed, over the seeds that both have; None where they share none."""
    shared = sorted(values.keys() & against.keys())
    return interval([values[seed] - against[seed] for seed in shared]) if shared else None


def t_cdf(t: float, degrees: int) -> float:
    """Student's cumulative distribution for whole `degrees` of freedom, in closed form.

    Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even), with theta = arctan(t / sqrt(degrees)).
    """
    theta = math.atan(t / math.sqrt(degrees))
    term = math.cos(theta) if degrees % 2 else 1.0
    total = 0.0
    for k in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
    within = math.sin(theta) * total
    if degrees % 2:
        within = 2 / math.pi * (theta + within)
    return 0.5 + within / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's distribution has `probability` (0.5 to 1), by halving an interval."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return high
