"""The world and its pictures: random access, disjoint splits, geometry and colours as drawn.

Legend: H, W image height and width.
"""

import colorsys
import itertools
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mamo.world.captions import _IDENTIFYING_STREAM, _full
from mamo.world.grammar import is_true
from mamo.world.rendering import render
from mamo.world.scene import Background, Difficulty, Scene, SceneObject, SceneWorld, near_duplicate
from tests.world.masks import coverage

DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "full")
EMPTY = Background("plain", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 2.0, 2.0, noise=0.0)


def drawn_pixels(scene: Scene, index: int, image_size_px: tuple[int, int]) -> np.ndarray:
    """Boolean [H, W]: where the picture changes when object `index` is taken away."""
    rest = replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])
    return (render(scene, image_size_px) != render(rest, image_size_px)).any(axis=2)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_scenes_do_not_depend_on_the_order_of_access(difficulty: Difficulty) -> None:
    """Catches a generator that is shared between scenes."""
    forwards = [SceneWorld(difficulty, 3).scene("train", i) for i in range(50)]
    world = SceneWorld(difficulty, 3)
    backwards = [world.scene("train", i) for i in reversed(range(50))][::-1]
    assert forwards == backwards
    assert all(np.array_equal(render(a, (40, 56)), render(b, (40, 56))) for a, b in zip(forwards, backwards))


def test_scenes_do_not_depend_on_the_process() -> None:
    """Catches captions or scenes drawn from a set, whose order changes with Python's hash seed."""
    program = (
        "import hashlib; from mamo.world.scene import SceneWorld; from mamo.world.captions import all_captions;"
        "from mamo.world.vocabulary import VOCABULARY;"
        "scenes = [SceneWorld(d, 0).scene('val', i) for d in ('easy', 'full') for i in range(50)];"
        "print(hashlib.sha256(repr([(s, all_captions(s), VOCABULARY) for s in scenes]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_near_duplicate_differs_in_one_word(difficulty: Difficulty) -> None:
    """Catches a distractor that equals its original, differs by more, or of which the original's caption is true."""
    world = SceneWorld(difficulty, 0)
    changed: Counter[str] = Counter()
    for index in range(300):
        scene = world.scene("test", index)
        other = near_duplicate(scene)
        pairs = [(a, b) for a, b in zip(scene.objects, other.objects, strict=True) if a != b]
        ((first, second),) = pairs
        (attribute,) = [
            name for name in ("shape", "colour", "pattern") if getattr(first, name) != getattr(second, name)
        ]
        assert replace(first, **{attribute: getattr(second, attribute)}) == second
        assert other.background == scene.background
        changed[attribute] += 1
        for shown, said in ((scene, other), (other, scene)):
            statement = _full(said, said.rng(_IDENTIFYING_STREAM), total_probability=0.0).statement
            assert is_true(statement, said.objects)
            assert not is_true(statement, shown.objects)
    assert set(changed) == ({"shape", "colour"} | ({"pattern"} if difficulty == "full" else set()))
    assert min(changed.values()) > 60


def test_no_scene_repeats_within_or_across_splits_seeds_and_difficulties() -> None:
    """Catches test scenes that were trained on, and a seed or an index that the stream ignores."""
    scenes = [SceneWorld("easy", 0).scene(split, i) for split in ("train", "val", "test") for i in range(3000)]
    scenes += [SceneWorld("easy", 1).scene("train", i) for i in range(1000)]
    scenes += [SceneWorld("full", 0).scene(split, 2**40 + i) for split in ("train", "test") for i in range(1000)]
    # The centres are continuous, so two equal ones mean that the same random numbers were read.
    centres = [(thing.centre_x, thing.centre_y) for scene in scenes for thing in scene.objects]
    assert len(set(centres)) == len(centres)


def test_the_noise_differs_between_scenes_and_splits() -> None:
    """Catches a constant noise pattern, which would hide every change of the background."""
    scene = SceneWorld("full", 0).scene("train", 0)
    pictures = [render(s, (32, 32)) for s in (scene, replace(scene, index=1), replace(scene, split="test"))]
    assert all((a != b).mean() > 0.5 for a, b in itertools.pairwise(pictures))


def test_a_wrong_argument_is_refused_by_name() -> None:
    """Catches a misspelt split or difficulty that is served some other scene."""
    with pytest.raises(ValueError, match="difficulty 'hard' is unknown; use one of easy, full"):
        SceneWorld("hard", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split 'dev' is unknown; use one of train, val, test"):
        SceneWorld("easy", 0).scene("dev", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index -1"):
        SceneWorld("easy", 0).scene("train", -1)
    with pytest.raises(ValueError, match="seed -1"):
        SceneWorld("easy", -1)
    with pytest.raises(ValueError, match="image size"):
        render(SceneWorld("easy", 0).scene("train", 0), (0, 8))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("image_size_px", [(160, 160), (150, 230), (230, 150)])
def test_objects_do_not_overlap_and_their_boxes_are_tight(
    difficulty: Difficulty, image_size_px: tuple[int, int]
) -> None:
    """Catches touching objects, boxes in swapped or relative units, an angle turned the wrong way, and clipping."""
    world = SceneWorld(difficulty, 0)
    for index in range(60):
        scene = world.scene("train", index)
        taken = np.zeros(image_size_px, bool)
        for k, thing in enumerate(scene.objects):
            pixels = drawn_pixels(scene, k, image_size_px)
            assert not (taken & pixels).any()
            taken |= pixels
            x, y, width, height = thing.box_px(image_size_px)
            assert x >= 0
            assert y >= 0
            assert x + width <= image_size_px[1]
            assert y + height <= image_size_px[0]
            rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
            seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            # Soft edges reach half a pixel too far; a star's tip is thinner than a pixel and leaves no trace there.
            assert np.abs(seen - [x, y, x + width, y + height]).max() <= (2.5 if thing.shape == "star" else 1.75)


@pytest.mark.parametrize(("difficulty", "n_sizes", "n_shapes"), [("easy", 2, 5), ("full", 3, 7)])
def test_the_world_has_what_it_promises(difficulty: Difficulty, n_sizes: int, n_shapes: int) -> None:
    """Catches an attribute that is never drawn, and repeated kinds or numbers of objects that never occur."""
    scenes = [SceneWorld(difficulty, 0).scene("train", i) for i in range(1500)]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {len(scene.objects) for scene in scenes} == ({2, 3} if difficulty == "easy" else {2, 3, 4, 5})
    assert [len({getattr(t, a) for t in things}) for a in ("shape", "colour", "size")] == [n_shapes, 8, n_sizes]
    assert len({t.pattern for t in things}) == (1 if difficulty == "easy" else 3)
    radii = {size: [t.radius for t in things if t.size == size] for size in {t.size for t in things}}
    order = sorted(radii, key=lambda size: min(radii[size]))
    assert all(min(radii[b]) > 1.25 * max(radii[a]) for a, b in itertools.pairwise(order))  # decidable
    repeated = np.mean([len({(t.shape, t.colour) for t in s.objects}) < len(s.objects) for s in scenes])
    assert 0.15 < repeated < 0.45


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners in radii, y downwards, written down by hand for a shape that stands upright."""
    tips = [(math.sin(math.pi * k / 5), -math.cos(math.pi * k / 5)) for k in range(10)]
    return {
        "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
        "triangle": [(0.0, -1.0), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5)],
        "bar": [(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)],
        "cross": [
            *[(-0.3, -0.92), (0.3, -0.92), (0.3, -0.3), (0.92, -0.3), (0.92, 0.3), (0.3, 0.3)],
            *[(0.3, 0.92), (-0.3, 0.92), (-0.3, 0.3), (-0.92, 0.3), (-0.92, -0.3), (-0.3, -0.3)],
        ],
        "star": [(x * s, y * s) for (x, y), s in zip(tips, [1.0, 0.42] * 5)],
    }[shape]


@pytest.mark.parametrize("shape", ["square", "triangle", "bar", "cross", "star", "circle", "ring"])
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_shapes_equal_an_independent_rasteriser(shape: str, angle: float) -> None:
    """Catches a wrong distance formula: compares with Pillow's polygons at 8 times the resolution."""
    thing = SceneObject(shape, "red", "large", "solid", 0.55, 0.45, 0.35, angle)
    size, scale = 64, 8
    image = Image.new("L", (size * scale, size * scale))
    centre, radius = np.array([0.55, 0.45]) * size * scale, 0.35 * size * scale
    if shape in ("circle", "ring"):
        for reach, fill in ((0.88, 255), (0.46, 0)) if shape == "ring" else ((0.88, 255),):
            ImageDraw.Draw(image).ellipse([*(centre - reach * radius), *(centre + reach * radius)], fill=fill)
    else:
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        corners = np.array(outline(shape)) @ turn * radius + centre
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=255)
    expected = np.asarray(image, np.float64).reshape(size, scale, size, scale).mean(axis=(1, 3)) / 255
    difference = np.abs(coverage(thing, (size, size)) - expected)
    assert difference.mean() < 0.004
    assert difference.max() < 0.5


def colour_word(rgb: np.ndarray) -> str:
    """What a person would call the colour, by hue and saturation."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.2:
        return "white"
    names = {0: "red", 54: "yellow", 127: "green", 183: "cyan", 230: "blue", 284: "purple", 334: "pink"}
    nearest = min(names, key=lambda degrees: abs((hue * 360 - degrees + 180) % 360 - 180))
    return names[nearest]


@pytest.mark.parametrize(("difficulty", "side"), [("easy", 48), ("full", 64)])
def test_colours_are_what_they_are_called(difficulty: Difficulty, side: int) -> None:
    """Catches swapped channels, a wrong palette entry, and an object lost in its background or noise."""
    n_seen = 0
    for index in range(150):
        scene = SceneWorld(difficulty, 0).scene("train", index)
        picture = render(scene, (side, side))
        for thing in scene.objects:
            inside = coverage(thing, (side, side)) > 0.95
            n_seen += 1
            assert colour_word(picture[inside].mean(axis=0)) == thing.colour
    assert n_seen > 300


def test_patterns_alternate_and_solid_does_not() -> None:
    """Catches a pattern that is not drawn, and stripes that are checks."""
    size = 128
    scene = SceneWorld("full", 0).scene("train", 0)
    spread: dict[str, tuple[float, float]] = {}
    for pattern in ("solid", "striped", "checked"):
        thing = SceneObject("square", "white", "large", pattern, 0.5, 0.5, 0.4, 0.0)
        picture = render(replace(scene, objects=(thing,), background=EMPTY), (size, size)).astype(float)
        inside = picture[36:92, 36:92, 0]
        spread[pattern] = (float(inside.std(axis=1).mean()), float(inside.std(axis=0).mean()))
    assert max(spread["solid"]) == 0
    assert spread["striped"][0] > 30
    assert spread["striped"][1] < 1
    assert min(spread["checked"]) > 30
