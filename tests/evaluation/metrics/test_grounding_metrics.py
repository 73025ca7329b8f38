"""Boxes from heat maps, against counted pixels and naive sums."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mamo.evaluation.metrics.grounding import (
    best_proposal,
    grounding_metrics,
    iou,
    points_inside,
    to_image_size,
    to_image_size_bicubic,
)


def counted(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """IoU by painting pixels."""
    canvas = np.zeros((2, 60, 60), bool)
    for layer, (x, y, w, h) in zip(canvas, (a, b)):
        layer[y : y + h, x : x + w] = True
    return float((canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum())


def test_iou_counts_pixels() -> None:
    """Would catch an intersection without the last pixel, corners taken for sizes, and swapped axes."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        a, b = (tuple(int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(1, 30, 2))) for _ in range(2))
        shared = [min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
        assert iou(a, b) == pytest.approx(counted(a, b) if min(shared) > 1 else 0)
    assert iou((3, 4, 20, 10), (3, 4, 20, 10)) == 1


def test_heat_for_its_size() -> None:
    """Would catch the sum (the largest box wins), the mean (the smallest), rows for columns, and an off-by-one."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        heat = rng.random((37, 53)) ** 4
        boxes = [tuple(int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(1, 7, 2))) for _ in range(9)]
        naive = [heat[y : y + h, x : x + w].sum() / (w * h) ** 0.5 for x, y, w, h in boxes]
        assert best_proposal(heat, boxes) == int(np.argmax(naive))
    heat = np.full((40, 40), 0.05)
    heat[10:20, 20:30] = 1
    boxes = [(0, 0, 40, 40), (20, 10, 10, 10), (24, 14, 2, 2), (10, 20, 10, 10)]
    assert best_proposal(heat, boxes) == 1


def test_proposals_that_cannot_be_scored() -> None:
    """Would catch an empty list that scores as a miss, and a box outside that scores as 0 / 0."""
    with pytest.raises(ValueError, match="no proposal to choose from"):
        best_proposal(np.ones((4, 4)), [])
    with pytest.raises(ValueError, match=r"proposal 1 \(9, 0, 3, 3\) covers no pixel of 4 x 4"):
        best_proposal(np.ones((4, 4)), [(0, 0, 2, 2), (9, 0, 3, 3)])


@pytest.mark.parametrize("cell", [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2)])
def test_a_patch_is_hottest_in_its_middle(cell: tuple[int, int]) -> None:
    """Would catch heat that rises to the border, so that any box in a corner looks as warm as the right one."""
    heat = torch.zeros(3, 3)
    heat[cell] = 1
    whole = to_image_size(heat, (45, 63))
    middle = (15 * cell[0] + 7, 21 * cell[1] + 10)
    assert np.unravel_index(whole.argmax(), whole.shape) == middle
    assert whole[middle] == pytest.approx(1)
    assert whole[middle[0] + 5, middle[1]] == pytest.approx(1 - 5 / 15)
    assert whole[middle[0], middle[1] - 7] == pytest.approx(1 - 7 / 21)


def test_away_from_the_border_the_map_is_pytorchs_bilinear_one() -> None:
    """Would catch exchanged axes, half a pixel's shift, another interpolation than the docstring says."""
    heat = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(heat[None, None].double(), (50, 84), mode="bilinear")[0, 0].numpy()
    assert np.abs(to_image_size(heat, (50, 84)) - expected)[5:45, 6:78].max() < 1e-12


@pytest.mark.parametrize("resize", [to_image_size, to_image_size_bicubic])
def test_a_map_on_a_grid_that_is_not_square(resize: Callable[[torch.Tensor, tuple[int, int]], np.ndarray]) -> None:
    """Would catch exchanged axes, and negative overshoot of the interpolation."""
    heat = torch.zeros(3, 6)
    heat[2, 4] = 1
    whole = resize(heat, (30, 120))
    assert whole.shape == (30, 120)
    assert whole.min() == 0
    assert points_inside(whole, (80, 20, 20, 10))
    assert not points_inside(whole, (20, 20, 20, 10))
    assert best_proposal(whole, [(0, 0, 20, 10), (80, 20, 20, 10)]) == 1


def test_metrics_and_what_to_compare_with() -> None:
    """Would catch an upper bound of the chosen box alone, and a random baseline of 1 / proposals."""
    heat = np.zeros((20, 20))
    heat[5, 5] = 1
    near, far = (2, 2, 8, 8), (12, 12, 8, 8)
    found = grounding_metrics([heat] * 3, [[near, far], [near, far, far], [near]], [near, far, far])
    assert found == {
        "proposal": pytest.approx(100 / 3),
        "pointing": pytest.approx(100 / 3),
        "random_proposal": pytest.approx(100 * (1 / 2 + 2 / 3) / 3),
        "upper_bound": pytest.approx(200 / 3),
    }
