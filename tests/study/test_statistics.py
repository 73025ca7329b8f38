"""Intervals and paired differences against a table and scipy's tests."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mamo.study.statistics import (
    MOST_SEEDS,
    holm_intervals,
    interval,
    paired_difference,
    seeds_needed,
    upper_spread,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-3)


def test_by_hand() -> None:
    """Bug: a one-sided 95 % where two-sided is meant, or the normal's 1.96 for five seeds (Student's table: 2.776)."""
    found = interval([0.0, 1.0, 2.0, 3.0, 4.0])
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-3)


@given(VALUES)
def test_interval(values: list[float]) -> None:
    """Bug: n in place of n - 1, or the deviation in place of the standard error."""
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-7, abs=1e-9)
    assert found.n == len(values)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=9))
def test_paired_difference(pairs: list[tuple[float, float]]) -> None:
    """Bug: seeds are paired by position, not by seed; or the two are taken for independent samples."""
    a = {seed: pair[0] for seed, pair in enumerate(pairs)}
    b = {seed: pair[1] for seed, pair in reversed(list(enumerate(pairs)))}
    found = paired_difference({**a, 100: 50.0}, {101: -50.0, **b})
    differences = np.array([x - y for x, y in pairs])
    if np.std(differences) < 1e-6:
        return
    expected = stats.ttest_rel([x for x, _ in pairs], [y for _, y in pairs]).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-7, abs=1e-9)
    assert found.n == len(pairs)


def test_few_values() -> None:
    """Bug: one seed gets an interval of width zero, which looks like certainty; no seed gets a mean."""
    alone = interval([3.0])
    assert (alone.mean, alone.n) == (3.0, 1)
    assert math.isnan(alone.low)
    assert not alone.excludes_zero
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="no values"):
        interval([])
    assert interval([2.0, 2.0]).excludes_zero
    assert not interval([-1.0, 2.0]).excludes_zero
    assert interval([-1.0, -1.1]).excludes_zero


def test_upper_spread_by_the_table() -> None:
    """Bug: the bound of a spread is its lower one, or counts n degrees of freedom (chi2: 1.649, 0.446)."""
    assert upper_spread(1.0, 5) == pytest.approx(math.sqrt(4 / 1.649), abs=1e-3)
    assert upper_spread(2.0, 3) == pytest.approx(2 * math.sqrt(2 / 0.446), abs=2e-3)


def test_upper_spread_covers_the_true_one() -> None:
    """Bug: four studies of five do not have enough seeds."""
    draws = np.random.default_rng(0).normal(0, 3, (2000, 5)).std(axis=1, ddof=1)
    share = np.mean([upper_spread(float(spread), 5) >= 3 for spread in draws])
    assert 0.77 < share < 0.83


@given(st.floats(0.1, 20), st.floats(0.5, 10), st.integers(2, 12))
def test_seeds_needed_are_the_fewest(spread: float, at_most: float, n_seeds: int) -> None:
    """Bug: a seed too few, or seeds are added without end."""
    found = seeds_needed(spread, at_most, n_seeds)
    assert n_seeds <= found <= MOST_SEEDS

    def width(n: int) -> float:
        return float(stats.t.interval(0.95, n - 1, scale=spread / math.sqrt(n))[1])

    assert width(found) <= at_most * (1 + 1e-9) or found == MOST_SEEDS
    assert found == n_seeds or width(found - 1) > at_most


@pytest.mark.parametrize("true_difference", [0.0, 4.0])
def test_added_seeds_keep_the_coverage(true_difference: float) -> None:
    """Bug: seeds that are added after the spread was seen make intervals hold less, or one direction likelier."""
    rng = np.random.default_rng(1)
    covered, n_used, below = [], [], []
    for spread in (4.0, 6.3, 9.0):
        for _ in range(500):
            sample = rng.normal(true_difference, spread, MOST_SEEDS)
            n = seeds_needed(float(np.std(sample[:8], ddof=1)), 4.0, 8)
            found = interval(sample[:n])
            covered.append(found.low <= true_difference <= found.high)
            below.append(found.high < true_difference)
            n_used.append(n)
    assert 0.93 < np.mean(covered) < 0.97
    assert 0.015 < np.mean(below) < 0.035
    assert len({*n_used}) > 3


@given(st.lists(VALUES, min_size=1, max_size=6))
def test_corrected_intervals_exclude_zero_where_holm_rejects(samples: list[list[float]]) -> None:
    """Bug: Bonferroni at every step, no correction, or a rejection after the first comparison that holds."""
    p_values = [float(stats.ttest_1samp(sample, 0).pvalue) for sample in samples]
    if any(abs(p * k - 0.05) < 1e-6 for p in p_values for k in range(1, 7)):
        return
    rejected = [False] * len(samples)
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if p_values[place] * (len(samples) - rank) >= 0.05:
            break
        rejected[place] = True
    found = holm_intervals(samples)
    assert [estimate.excludes_zero for estimate in found] == rejected
    for sample, estimate in zip(samples, found):
        assert estimate.high - estimate.low >= (plain := interval(sample)).high - plain.low - 1e-9


def test_the_second_of_two_comparisons_is_corrected_less() -> None:
    """Bug: Bonferroni at every step: 0.04 is not rejected after 0.001, though the second step of Holm has 0.05."""
    spread = [-1.0, 1.0] * 4  # standard deviation sqrt(8 / 7); Student's t of 7: 2.517 at 0.04, 5.408 at 0.001
    clear, near = ([shift * math.sqrt(1 / 7) + value for value in spread] for shift in (5.408, 2.517))
    assert stats.ttest_1samp(near, 0).pvalue == pytest.approx(0.04, abs=1e-3)
    assert [one.excludes_zero for one in holm_intervals([near, clear])] == [True, True]
    assert [one.excludes_zero for one in holm_intervals([near, near])] == [False, False]


def test_corrected_intervals_err_in_one_study_of_twenty() -> None:
    """Bug: with five comparisons, one study of four finds something where there is nothing."""
    rng = np.random.default_rng(2)
    wrong = [any(one.excludes_zero for one in holm_intervals(rng.normal(0, 5, (5, 8)))) for _ in range(600)]
    assert 0.03 < np.mean(wrong) < 0.075
    assert holm_intervals([[3.0], [1.0, 2.0, 3.0]])[1] == interval([1.0, 2.0, 3.0])
