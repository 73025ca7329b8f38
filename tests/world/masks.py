"""Soft masks of objects, for tests of the renderer and of what the captions refer to."""

import numpy as np

from mamo.world.rendering import Floats, _coverage, _window
from mamo.world.scene import SceneObject


def coverage(obj: SceneObject, image_size_px: tuple[int, int]) -> Floats:
    """Return the share of each pixel that `obj` covers, float32 [H, W] from 0 to 1."""
    covered = np.zeros(image_size_px, np.float32)
    rows, columns, u, v, radius_px = _window(obj, image_size_px)
    covered[rows, columns] = _coverage(obj.shape, u, v, radius_px)
    return covered
