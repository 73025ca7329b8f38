"""Means, intervals and paired differences over a few seeds (Student 1908), corrections and the number of seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SPREAD_CONFIDENCE = 0.8
"""Of the upper bound of a spread that few exploring seeds estimate."""
MOST_SEEDS = 16


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


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
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
    half = half_width(float(np.std(values, ddof=1)), n, confidence)
    return Estimate(mean, mean - half, mean + half, n)


def half_width(spread: float, n: int, confidence: float = CONFIDENCE) -> float:
    """Return half the width of the t interval of `n` values whose standard deviation is `spread`."""
    return float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n)


def differences(values: Mapping[int, float], against: Mapping[int, float]) -> list[float]:
    """Return `values` minus `against` of each seed of both, in the order of the seeds."""
    return [values[seed] - against[seed] for seed in sorted(values.keys() & against.keys())]


def paired_difference(values: Mapping[int, float], against: Mapping[int, float]) -> Estimate | None:
    """Estimate `values` minus `against`, paired by seed, over the seeds of both; None without a common seed."""
    shared = differences(values, against)
    return interval(shared) if shared else None


def holm_intervals(samples: Sequence[Sequence[float]]) -> list[Estimate]:
    """Return an interval for the mean of each sample, corrected for their number (Holm 1979).

    The k-th smallest of m p-values is compared with (1 - `CONFIDENCE`) / (m - k + 1); the first that is not below it
    ends the rejections. Each interval has the level of its comparison, those after the end the level of the end. So an
    interval excludes zero where Holm's procedure rejects, and only there.

    Args:
        samples: values of each comparison; one of a single value has no interval, and is not counted.
    """
    tested = [place for place, sample in enumerate(samples) if len(sample) > 1]
    p_values = {place: _p_value(samples[place]) for place in tested}
    found = {place: interval(sample) for place, sample in enumerate(samples) if len(sample) <= 1}
    error, is_ended = 1 - CONFIDENCE, False
    for rank, place in enumerate(sorted(tested, key=lambda place: p_values[place])):
        if not is_ended:
            error = (1 - CONFIDENCE) / (len(tested) - rank)
        found[place] = interval(samples[place], 1 - error)
        is_ended = is_ended or p_values[place] >= error
    return [found[place] for place in range(len(samples))]


def _p_value(sample: Sequence[float]) -> float:
    """Return the two-sided p-value of the t test that the mean is zero."""
    spread = float(np.std(sample, ddof=1))
    if spread == 0:
        return 1.0 if sample[0] == 0 else 0.0
    score = abs(float(np.mean(sample))) / spread * math.sqrt(len(sample))
    return 2 * float(stats.t.sf(score, len(sample) - 1))


def upper_spread(spread: float, n: int) -> float:
    """Return the upper 80 % bound of a standard deviation that `n` normal values estimate: s sqrt((n - 1) / chi2)."""
    return spread * math.sqrt((n - 1) / float(stats.chi2.ppf(1 - SPREAD_CONFIDENCE, n - 1)))


def seeds_needed(spread: float, half_width_at_most: float, n_seeds: int) -> int:
    """Return the smallest number of seeds, from `n_seeds` to `MOST_SEEDS`, whose interval is narrow enough.

    It reads the spread, not the mean, so that adding seeds favours neither direction. `MOST_SEEDS` where none is.
    """
    enough = (n for n in range(n_seeds, MOST_SEEDS) if half_width(spread, n) <= half_width_at_most)
    return next(enough, max(n_seeds, MOST_SEEDS))
