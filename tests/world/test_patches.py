"""Questions about patches: which object a patch shows, its neighbour, and what is hidden."""

from dataclasses import replace

import numpy as np
import pytest

from mamo.world.grammar import WORD_CLASSES
from mamo.world.patches import caption_without, hidden_objects, shown_patches, shown_shares
from mamo.world.rendering import render
from mamo.world.scene import Scene, SceneWorld

SIZE = (72, 72)
WORLD = SceneWorld("full", 0)
SCENES = [WORLD.scene("val", k) for k in range(60)]


def seen_shares(scene: Scene, k: int, grid: tuple[int, int]) -> np.ndarray:
    """Share of each patch whose pixels change where object `k` is left out, or of its pixels in the patch."""
    rest = replace(scene, objects=(*scene.objects[:k], *scene.objects[k + 1 :]))
    changed = (render(scene, SIZE) != render(rest, SIZE)).any(axis=2)
    areas = changed.reshape(grid[0], SIZE[0] // grid[0], grid[1], SIZE[1] // grid[1]).sum(axis=(1, 3)).ravel()
    return areas / min(changed.sum(), SIZE[0] * SIZE[1] / grid[0] / grid[1])


@pytest.mark.parametrize("grid", [(3, 3), (9, 9)])
def test_a_patch_shows_the_object_whose_pixels_it_has(grid: tuple[int, int]) -> None:
    """Bug: rows and columns of patches exchanged, or the share of another object."""
    shown = shown_patches(SCENES, SIZE, grid)
    assert len(shown) > 100
    for scene in SCENES[:20]:
        shares = shown_shares(scene, SIZE, grid)
        for k in range(len(scene.objects)):
            # a change of pixels counts an edge as a whole pixel: larger, by a rim
            assert np.abs(shares[k] - seen_shares(scene, k, grid)).max() < 0.3
    for item in shown:
        scene = SCENES[item.row]
        k = scene.objects.index(item.own)
        assert seen_shares(scene, k, grid)[item.patch] >= 0.5
        others = [obj for obj in scene.objects if obj is not item.own]
        distances = [
            (obj.centre_x - item.own.centre_x) ** 2 + (obj.centre_y - item.own.centre_y) ** 2 for obj in others
        ]
        assert item.neighbour is others[int(np.argmin(distances))]


def test_a_hidden_object_leaves_no_pixel() -> None:
    """Bug: a patch at the object's edge stays visible and shows its colour."""
    for item in hidden_objects(SCENES, SIZE, (9, 9)):
        scene = SCENES[item.row]
        shares = seen_shares(scene, scene.objects.index(item.own), (9, 9))
        assert not set(np.flatnonzero(shares > 0.05)) - set(item.masked)
        assert item.patch in item.masked
        assert item.nearest_visible not in item.masked
        assert shares[item.patch] >= 0.5


def test_a_caption_leaves_the_attribute_out() -> None:
    """Bug: the probed attribute of another object stays, or the caption loses its relations too."""
    for scene in SCENES:
        whole = caption_without(scene).replace(",", "").split()
        for name in ("colour", "shape", "pattern"):
            words = caption_without(scene, name).replace(",", "").split()
            assert not set(words) & WORD_CLASSES[name]
            kept = {"relation", "size", "colour", "shape", "pattern"} - {name}
            for other in kept:
                assert [w for w in words if w in WORD_CLASSES[other]] == [w for w in whole if w in WORD_CLASSES[other]]
