"""Weakly supervised grounding without a box head: turn a heat map into a box and score it.

Boxes are (x, y, width, height) in pixels of the image. Legend: H, W height and width of the image, h, w of the map.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mamo.data.records import Box, whole_pixels

IOU_THRESHOLD = 0.5


def iou(a: Box, b: Box) -> float:
    """Return intersection over union as RefCOCO's API computes it: the last pixel of a box is x + width - 1, inclusive.

    For whole numbers this is the exact ratio of pixel counts, except that boxes that share only one row or one column
    of pixels count as disjoint.
    """
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2] - 1, b[0] + b[2] - 1), min(a[1] + a[3] - 1, b[1] + b[3] - 1)
    if left >= right or top >= bottom:
        return 0.0
    shared = (right - left + 1) * (bottom - top + 1)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def to_image_size(heat: Tensor, image_size_px: tuple[int, int]) -> NDArray[np.float64]:
    """Interpolate a heat map [h, w] over the patches to [H, W] of the image: bilinear, zero outside of the image.

    A patch is therefore hottest in its middle, at the border too. With border padding the heat would stay flat or rise
    from a border patch's middle to the border, which matters where patches are few.
    """
    rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1 for side in image_size_px)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)[None]  # [1, H, W, (x, y)]
    whole = functional.grid_sample(heat[None, None].double(), places, padding_mode="zeros", align_corners=False)
    found: NDArray[np.float64] = whole[0, 0].numpy()
    return found


def to_image_size_bicubic(heat: Tensor, image_size_px: tuple[int, int]) -> NDArray[np.float64]:
    """Interpolate bicubically, cut at 0, with border padding."""
    return to_image_size_albef(heat, image_size_px).clip(min=0)


def to_image_size_albef(heat: Tensor, image_size_px: tuple[int, int]) -> NDArray[np.float64]:
    """Interpolate as ALBEF's protocol for RefCOCO does: bicubic, not cut, with border padding.

    Next to a hot patch the heat falls below 0, which counts against a box that reaches there.
    """
    whole = functional.interpolate(heat[None, None].double(), image_size_px, mode="bicubic", align_corners=False)
    found: NDArray[np.float64] = whole[0, 0].numpy()
    return found


def best_proposal(heat: NDArray[np.float64], proposals: Sequence[Box]) -> int:
    """Return the index of the best proposal: the sum of heat in the box over the root of its area (as ALBEF).

    The root lies between the sum, which favours the whole image, and the mean, which favours the smallest box.

    Args:
        heat: float [H, W].
        proposals: boxes within the image; their borders are rounded to whole pixels.

    Raises:
        ValueError: there is no proposal, or one covers no pixel of the image; the message has its index and the box.
    """
    if len(proposals) == 0:
        raise ValueError("grounding: there is no proposal to choose from")
    height, width = heat.shape
    total = np.zeros((height + 1, width + 1))  # summed over rows and columns: a box's sum is four look-ups
    total[1:, 1:] = heat.cumsum(axis=0).cumsum(axis=1)
    scores = []
    for index, box in enumerate(proposals):
        pixels, (x, y, w, h) = whole_pixels(box, width, height), box
        if pixels is None:
            raise ValueError(f"grounding: proposal {index} {(x, y, w, h)} covers no pixel of {width} x {height}")
        left, top, right, bottom = pixels
        inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
        scores.append(inside / math.sqrt(w * h))
    return int(np.argmax(scores))


def points_inside(heat: NDArray[np.float64], gold: Box) -> bool:
    """Play the pointing game (Zhang et al. 2016): return whether the hottest pixel's centre lies in the gold box."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    x, y, w, h = gold
    return bool(x <= column + 0.5 < x + w and y <= row + 0.5 < y + h)


def grounding_scores(heat: NDArray[np.float64], proposals: Sequence[Box], gold: Box) -> dict[str, float]:
    """Score one expression, each score 0 to 1; without proposals only `pointing`.

    `proposal`: the chosen one's IoU with the gold box is at least 0.5. Baselines are `random_proposal` (the expected
    value of a uniform choice) and `upper_bound` (some proposal fits).
    """
    found = {"pointing": float(points_inside(heat, gold))}
    if proposals:
        fits = [iou(box, gold) >= IOU_THRESHOLD for box in proposals]
        found["proposal"] = float(fits[best_proposal(heat, proposals)])
        found |= {"random_proposal": sum(fits) / len(fits), "upper_bound": float(any(fits))}
    return found


def mean_percent(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average `grounding_scores` over expressions, in percent; each score over the expressions that have it."""
    names = ("proposal", "pointing", "random_proposal", "upper_bound")
    columns = {name: [row[name] for row in found if name in row] for name in names}
    return {name: 100 * sum(values) / len(values) for name, values in columns.items() if values}


def grounding_metrics(
    heats: Sequence[NDArray[np.float64]], proposals: Sequence[Sequence[Box]], gold: Sequence[Box]
) -> dict[str, float]:
    """Compute `mean_percent` of `grounding_scores` over expressions with proposals."""
    return mean_percent([grounding_scores(*row) for row in zip(heats, proposals, gold, strict=True)])
