"""Means, intervals and paired differences over a few seeds (Student 1908)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its confidence interval `low` to `high`; NaN bounds for a single value."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Return whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Estimate:
    """Compute the mean of independent values and its t interval: mean +- t * s / sqrt(n), s with n - 1.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to take the mean of")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(values: Mapping[int, float], against: Mapping[int, float]) -> Estimate | None:
    """Estimate `values` minus `against`, paired by seed, over the seeds of both; None without a common seed."""
    shared = sorted(values.keys() & against.keys())
    return interval([values[seed] - against[seed] for seed in shared]) if shared else None
