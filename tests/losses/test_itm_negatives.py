"""Hard negatives: never a positive, whatever the logits; drawn in proportion to their softmax."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mamo.losses.itm import draw_negatives

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # for busy machines
ODD = st.sampled_from([0.0, 1.0, -1.0, 50.0, 1e4, 1e30, -1e30, 3e38, math.inf, -math.inf, math.nan])


def gumbel(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).gumbel(size=shape)).float()


def same_image(image_id: list[list[int]]) -> Tensor:
    ids = torch.tensor(image_id)
    return ids[:, :, None] == ids[:, None, :]


@PATIENT
@given(st.data())
def test_a_negative_is_never_a_positive(data: st.DataObject) -> None:
    """Bug: the pair itself or another caption of the same image drawn as a mismatch, for any logits at all."""
    pools, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    ids = [data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)) for _ in range(pools)]
    values = data.draw(st.lists(ODD, min_size=pools * size**2, max_size=pools * size**2))
    similarity = torch.tensor(values).view(pools, size, size)
    is_positive = same_image(ids)
    noise = gumbel(pools, size, size, seed=data.draw(st.integers(0, 99)))
    negative, has_negative = draw_negatives(similarity, is_positive, noise)
    for pool in range(pools):
        for row in range(size):
            others = [c for c in range(size) if ids[pool][c] != ids[pool][row]]
            assert bool(has_negative[pool, row]) == bool(others)
            assert int(negative[pool, row]) in (others or [row])


@pytest.mark.parametrize("kind", ["equal", "one_hot", "overflowing", "underflowing"])
def test_special_similarities(kind: str) -> None:
    """Bug: at the start (all equal) or at convergence (all mass on the positive) there is nothing to draw from."""
    size = 6
    similarity = {
        "equal": torch.zeros(1, size, size),
        "one_hot": 1e5 * torch.eye(size)[None],
        "overflowing": torch.full((1, size, size), 3e38),
        "underflowing": torch.full((1, size, size), -3e38),
    }[kind]
    is_positive = torch.eye(size, dtype=torch.bool)[None]
    drawn = set()
    for seed in range(60):
        negative, has_negative = draw_negatives(similarity, is_positive, gumbel(1, size, size, seed=seed))
        assert has_negative.all()
        assert not (negative[0] == torch.arange(size)).any()
        drawn |= {(row, int(column)) for row, column in enumerate(negative[0])}
    assert len(drawn) == size * (size - 1)  # every negative has its chance


def test_a_pool_without_negatives_says_so() -> None:
    """Bug: a batch of one, or a pool of a single image, crashes or passes a positive off as a mismatch."""
    for is_positive in (torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(2, 3, 3, dtype=torch.bool)):
        negative, has_negative = draw_negatives(torch.zeros(is_positive.shape), is_positive, gumbel(*is_positive.shape))
        assert not has_negative.any()
        assert torch.equal(negative, torch.arange(is_positive.shape[1]).expand(is_positive.shape[:2]))


def test_negatives_follow_the_softmax() -> None:
    """Bug: always the hardest, or uniform ones; a temperature applied twice; positives that still take their share."""
    draws = 6000
    row = torch.tensor([0.5, 2.0, 1.0, -1.0, 2.5])
    is_positive = torch.zeros(1, 5, 5, dtype=torch.bool)
    is_positive[0, :, 4] = is_positive[0, :, 0] = True
    similarity, positive = row.expand(draws, 5, 5), is_positive.expand(draws, 5, 5)
    negative, _ = draw_negatives(similarity, positive, gumbel(draws, 5, 5))
    weights = np.exp([2.0, 1.0, -1.0])
    for place in range(5):  # rows of a pool are independent
        observed = np.bincount(negative[:, place].numpy(), minlength=5)
        assert observed[0] == observed[4] == 0
        assert stats.chisquare(observed[1:4], weights / weights.sum() * draws).pvalue > 1e-4


def test_no_gradient_flows_through_the_choice() -> None:
    """Bug: the choice keeps ITC's graph alive."""
    similarity = torch.randn(1, 4, 4, requires_grad=True)
    negative, has_negative = draw_negatives(similarity, torch.eye(4, dtype=torch.bool)[None], gumbel(1, 4, 4))
    assert not negative.requires_grad
    assert not has_negative.requires_grad
