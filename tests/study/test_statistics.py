"""Intervals and paired differences against a table and scipy's tests."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mamo.study.statistics import interval, paired_difference

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
