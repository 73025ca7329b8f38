"""Patches of scenes with their objects: the questions of the patch probes.

A patch shows an object if one object covers half of the patch, or half of the object lies in it. (An object can
be smaller than a patch.) Patches are numbered row by row.

Legend: N objects, H, W height and width of an image, h, w rows and columns of patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mamo.world.captions import identifying_draft
from mamo.world.grammar import write
from mamo.world.rendering import object_masks
from mamo.world.scene import Difficulty, Scene, SceneObject

LEAST_SHARE = 0.5
"""Of a patch that an object covers, or of an object that lies in a patch."""
_STREAM = 25  # random stream of a scene


@dataclass(frozen=True, slots=True)
class ShownPatch:
    """A patch of scene `row` of a list that shows `own`; `neighbour` is the nearest other object by the centres."""

    row: int
    patch: int
    own: SceneObject
    neighbour: SceneObject


@dataclass(frozen=True, slots=True)
class HiddenObject:
    """An object of scene `row` of a list, all of whose patches, `masked`, are hidden from the encoder.

    `patch` is the masked one that shows most of it, `nearest_visible` the nearest patch that is visible.
    """

    row: int
    patch: int
    nearest_visible: int
    masked: tuple[int, ...]
    own: SceneObject


def probed_attributes(difficulty: Difficulty) -> tuple[str, ...]:
    """Return the attributes that are asked for: in `easy` all patterns are solid."""
    return ("colour", "shape", "pattern") if difficulty == "full" else ("colour", "shape")


def shown_shares(scene: Scene, image_size_px: tuple[int, int], grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return the share of each patch that each object covers, or of the object in the patch if that is larger.

    Args:
        scene: the objects.
        image_size_px: (H, W), multiples of the grid.
        grid: (h, w).

    Returns:
        float64 [N, h * w], from 0 to 1.
    """
    masks = object_masks(scene, image_size_px).astype(np.float64)  # [N, H, W]
    patch_px = [side // patches for side, patches in zip(image_size_px, grid, strict=True)]
    areas = masks.reshape(len(masks), grid[0], patch_px[0], grid[1], patch_px[1]).sum(axis=(2, 4))  # [N, h, w]
    least = np.minimum(masks.sum(axis=(1, 2)), math.prod(patch_px))
    shares: npt.NDArray[np.float64] = areas.reshape(len(masks), -1) / least[:, None]
    return shares


def shown_patches(scenes: Sequence[Scene], image_size_px: tuple[int, int], grid: tuple[int, int]) -> list[ShownPatch]:
    """Return the patches that show exactly one object, of all scenes with two objects or more."""
    found = []
    for row, scene in enumerate(scenes):
        is_shown = shown_shares(scene, image_size_px, grid) >= LEAST_SHARE
        for patch in np.flatnonzero(is_shown.sum(axis=0) == 1).tolist():
            own = scene.objects[int(is_shown[:, patch].argmax())]
            others = [obj for obj in scene.objects if obj is not own]
            if others:
                found.append(ShownPatch(row, patch, own, min(others, key=lambda obj: _distance(own, obj))))
    return found


def hidden_objects(
    scenes: Sequence[Scene], image_size_px: tuple[int, int], grid: tuple[int, int]
) -> list[HiddenObject]:
    """Return a random object of each scene that some patch shows and whose patches leave others visible."""
    found = []
    for row, scene in enumerate(scenes):
        shares = shown_shares(scene, image_size_px, grid)
        options = [k for k in range(len(scene.objects)) if shares[k].max() >= LEAST_SHARE]
        if not options:
            continue
        k = scene.rng(_STREAM).choice(options)
        masked = tuple(np.flatnonzero(shares[k] > 0).tolist())
        patch = int(shares[k].argmax())
        visible = sorted(set(range(grid[0] * grid[1])) - set(masked), key=lambda other: _steps(patch, other, grid[1]))
        if visible:
            found.append(HiddenObject(row, patch, visible[0], masked, scene.objects[k]))
    return found


def caption_without(scene: Scene, attribute: str = "") -> str:
    """Write the identifying caption of a scene without an attribute; "" leaves nothing out."""
    draft = identifying_draft(scene)
    if attribute:
        mentions = tuple(replace(mention, **{attribute: ""}) for mention in draft.statement.mentions)
        draft = replace(draft, statement=replace(draft.statement, mentions=mentions))
    return write(draft, scene.objects).text


def _distance(one: SceneObject, other: SceneObject) -> float:
    return math.hypot(one.centre_x - other.centre_x, one.centre_y - other.centre_y)


def _steps(one: int, other: int, columns: int) -> tuple[int, int]:
    (row, column), (other_row, other_column) = divmod(one, columns), divmod(other, columns)
    return (row - other_row) ** 2 + (column - other_column) ** 2, other
