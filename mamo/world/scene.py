"""Scenes of the embedded world: the content of each image as a pure function of an index.

A scene holds a few coloured shapes that never overlap. Difficulty `easy` has 2 to 3 solid objects of 5 shapes, 8
colours and 2 sizes on a nearly plain background; `full` has 2 to 5 objects of 7 shapes, 8 colours, 3 sizes and 3 fill
patterns on plain, gradient or textured backgrounds with noise. The objects are in the cells of a grid of 3 x 3.

The random generator is Philox, which is counter-based. Its key is (world seed, difficulty), its counter is (position,
scene index, split, stream). No two scenes of a world read the same block. Any worker can therefore generate any scene
independently, in any order, and the splits are disjoint.

Streams: 0 objects, 1 pixel noise, 2 to 6 captions, 7 identifying caption, 16 probes, 17 masked words, 18 near
duplicates, 19 and 22 referring expressions, 20 questions, 21 statements, 23 minimal pairs, and listings.

Coordinates: `centre_x` is a fraction of the image width and `centre_y` of the image height, both from the top left
corner. `radius` is a fraction of the shorter image side. Objects that do not touch in the unit square therefore do not
touch in an image of any aspect ratio.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

Difficulty = Literal["easy", "full"]
Split = Literal["train", "val", "test"]
BackgroundKind = Literal["plain", "gradient", "texture"]
Option = TypeVar("Option")

DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "full")
SPLITS: tuple[Split, ...] = ("train", "val", "test")
COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, 0 to 255
    "red": (225, 30, 35),
    "green": (35, 165, 50),
    "blue": (40, 75, 245),
    "yellow": (245, 225, 40),
    "purple": (150, 40, 190),
    "cyan": (50, 215, 225),
    "pink": (255, 150, 195),
    "white": (250, 250, 250),
}
SHAPES: dict[Difficulty, tuple[str, ...]] = {
    "easy": ("circle", "square", "triangle", "cross", "ring"),
    "full": ("circle", "square", "triangle", "cross", "ring", "star", "bar"),
}
SIZES: dict[Difficulty, dict[str, tuple[float, float]]] = {  # least and greatest radius, in shorter image sides
    "easy": {"small": (0.080, 0.090), "large": (0.125, 0.135)},
    "full": {"small": (0.078, 0.082), "medium": (0.103, 0.107), "large": (0.134, 0.136)},
}
PATTERNS: dict[Difficulty, tuple[str, ...]] = {"easy": ("solid",), "full": ("solid", "striped", "checked")}
N_OBJECTS: dict[Difficulty, tuple[int, ...]] = {"easy": (2, 3, 3, 3, 3), "full": (2, 3, 3, 4, 4, 5)}  # drawn uniformly
MAX_ANGLE: dict[Difficulty, float] = {"easy": 0.15, "full": 0.30}  # radians, either way
COPY_PROBABILITY = 0.2  # of repeating a colour and shape among 3 or more objects, so that "two red circles" occurs
CELLS = 3  # objects are near the centres of cells of a CELLS x CELLS grid
CELL_JITTER = 0.018  # largest offset on each axis; small, so that patches cut objects of one shape in the same way
GAP = 0.025  # between circles of the largest objects in neighbouring cells, half of it to the border, in image sides

_DUPLICATE_STREAM = 18  # random stream of the scene

# Outlines in units of the object's radius, y downwards, inside the circle of radius 1. These circles never overlap.
CIRCLE_RADIUS = 0.88
SQUARE_HALF = 0.70
CROSS_LONG, CROSS_SHORT = 0.92, 0.30
BAR_LONG, BAR_SHORT = 0.95, 0.30
STAR_INNER = 0.42


def _star_outline() -> tuple[tuple[float, float], ...]:
    spokes = [(1.0 if k % 2 == 0 else STAR_INNER, math.pi * (k / 5 - 0.5)) for k in range(10)]
    return tuple((length * math.cos(angle), length * math.sin(angle)) for length, angle in spokes)


# Only corners that can touch the bounding box are listed.
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": tuple((x, y) for x in (-SQUARE_HALF, SQUARE_HALF) for y in (-SQUARE_HALF, SQUARE_HALF)),
    "triangle": tuple((math.cos(a), math.sin(a)) for a in (-math.pi / 2, math.pi / 6, math.pi * 5 / 6)),
    "cross": tuple(
        (sx * x, sy * y)
        for x, y in ((CROSS_LONG, CROSS_SHORT), (CROSS_SHORT, CROSS_LONG))
        for sx in (-1, 1)
        for sy in (-1, 1)
    ),
    "star": _star_outline(),
    "bar": tuple((x, y) for x in (-BAR_LONG, BAR_LONG) for y in (-BAR_SHORT, BAR_SHORT)),
}


class SceneRng:
    """Uniform random numbers of one Philox stream, generated in blocks because single calls are slow."""

    def __init__(self, seed: int, difficulty: Difficulty, split: Split, index: int, stream: int) -> None:
        key = seed | DIFFICULTIES.index(difficulty) << 64
        counter = index << 64 | SPLITS.index(split) << 128 | stream << 192
        self.generator = np.random.Generator(np.random.Philox(counter=counter, key=key))
        self._numbers: Iterator[float] = iter(())

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw one number, uniform in [low, high)."""
        number = next(self._numbers, None)
        if number is None:
            self._numbers = iter(self.generator.random(32).tolist())
            number = next(self._numbers)
        return low + (high - low) * number

    def choice(self, options: Sequence[Option]) -> Option:
        """Draw one of `options` uniformly."""
        return options[int(self.uniform() * len(options))]

    def permutation(self, n: int) -> list[int]:
        """Return the numbers 0 to n - 1 in random order."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = int(self.uniform() * (i + 1))
            order[i], order[j] = order[j], order[i]
        return order


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape. Coordinates as in the module's docstring; `angle` in radians, clockwise."""

    shape: str
    colour: str
    size: str
    pattern: str
    centre_x: float
    centre_y: float
    radius: float
    angle: float

    def box_px(self, image_size_px: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the tight box (x, y, width, height) in pixels for `image_size_px` = (height, width)."""
        height, width = image_size_px
        radius = self.radius * min(height, width)
        x, y = self.centre_x * width, self.centre_y * height
        if self.shape not in OUTLINES:
            reach = CIRCLE_RADIUS * radius
            return x - reach, y - reach, 2 * reach, 2 * reach
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        xs = [radius * (cos * u - sin * v) for u, v in OUTLINES[self.shape]]
        ys = [radius * (sin * u + cos * v) for u, v in OUTLINES[self.shape]]
        return x + min(xs), y + min(ys), max(xs) - min(xs), max(ys) - min(ys)


@dataclass(frozen=True, slots=True)
class Background:
    """Background of a scene: colours in sRGB 0 to 255, `angle` in radians, waves in cycles an image side.

    `noise` is the half-width, in grey levels, of the uniform noise that is added to every value of every pixel.
    """

    kind: BackgroundKind
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    angle: float
    waves_x: float
    waves_y: float
    noise: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Ground truth of one image, and the (seed, difficulty, split, index) that determine it."""

    seed: int
    difficulty: Difficulty
    split: Split
    index: int
    objects: tuple[SceneObject, ...]
    background: Background

    def rng(self, stream: int) -> SceneRng:
        """Return a new generator of a random stream of this scene. The module's docstring lists the streams."""
        return SceneRng(self.seed, self.difficulty, self.split, self.index, stream)


class SceneWorld:
    """All scenes of one difficulty and seed, with random access: `world.scene("train", 123456)`.

    Raises:
        ValueError: the difficulty is not "easy" or "full", or the seed is outside 0 to 2**64 - 1.
    """

    def __init__(self, difficulty: Difficulty, seed: int) -> None:
        if difficulty not in DIFFICULTIES:
            raise ValueError(f"scenes: difficulty {difficulty!r} is unknown; use one of {', '.join(DIFFICULTIES)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"scenes: seed {seed} must be between 0 and 2**64 - 1")
        self.difficulty = difficulty
        self.seed = seed

    def scene(self, split: Split, index: int) -> Scene:
        """Generate scene `index` of `split`; a pure function of (difficulty, seed, split, index).

        Raises:
            ValueError: the split is unknown, or the index is outside 0 to 2**64 - 1.
        """
        if split not in SPLITS:
            raise ValueError(f"scenes: split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        if not 0 <= index < 2**64:
            raise ValueError(f"scenes: index {index} must be between 0 and 2**64 - 1")
        rng = SceneRng(self.seed, self.difficulty, split, index, stream=0)
        background = _draw_background(self.difficulty, rng)
        return Scene(self.seed, self.difficulty, split, index, _draw_objects(self.difficulty, rng), background)


def attribute_values(attribute: str, difficulty: Difficulty) -> tuple[str, ...]:
    """Return all values of an attribute ("shape", "colour", "size" or "pattern") in a world of this difficulty."""
    values = {
        "shape": SHAPES[difficulty],
        "colour": tuple(COLOURS),
        "size": tuple(SIZES[difficulty]),
        "pattern": PATTERNS[difficulty],
    }
    return values[attribute]


def near_duplicate(scene: Scene) -> Scene:
    """Return `scene` with another shape, colour or fill pattern of one object, as a retrieval distractor.

    Places, sizes, background and noise stay the same. So does the wording of the captions; the identifying captions
    of the two scenes differ.
    """
    rng = scene.rng(_DUPLICATE_STREAM)
    options = {name: attribute_values(name, scene.difficulty) for name in ("shape", "colour", "pattern")}
    attribute = rng.choice([name for name, values in options.items() if len(values) > 1])
    index = int(rng.uniform() * len(scene.objects))
    obj = scene.objects[index]
    others = [value for value in options[attribute] if value != getattr(obj, attribute)]
    changed = replace(obj, **{attribute: rng.choice(others)})  # type: ignore[arg-type]
    return replace(scene, objects=(*scene.objects[:index], changed, *scene.objects[index + 1 :]))


def _draw_objects(difficulty: Difficulty, rng: SceneRng) -> tuple[SceneObject, ...]:
    n = rng.choice(N_OBJECTS[difficulty])
    colour_names = tuple(COLOURS)
    size_names = tuple(SIZES[difficulty])
    looks = [(rng.choice(SHAPES[difficulty]), rng.choice(colour_names)) for _ in range(n)]
    if n > 2 and rng.uniform() < COPY_PROBABILITY:
        looks[-1] = looks[0]  # their order does not matter: every caption shuffles it
    sizes = [rng.choice(size_names) for _ in range(n)]
    patterns = [rng.choice(PATTERNS[difficulty]) for _ in range(n)]
    radii = [rng.uniform(*SIZES[difficulty][size]) for size in sizes]
    angles = [rng.uniform(-MAX_ANGLE[difficulty], MAX_ANGLE[difficulty]) for _ in range(n)]
    centres = _place_in_cells(n, rng)
    return tuple(
        SceneObject(shape, colour, size, pattern, x, y, radius, angle)
        for (shape, colour), size, pattern, (x, y), radius, angle in zip(
            looks, sizes, patterns, centres, radii, angles, strict=True
        )
    )


def _place_in_cells(n: int, rng: SceneRng) -> list[tuple[float, float]]:
    """Draw centres in `n` distinct cells of the grid; the largest objects keep `GAP` between them."""
    cells = [divmod(cell, CELLS) for cell in rng.permutation(CELLS * CELLS)[:n]]
    jitter = (-CELL_JITTER, CELL_JITTER)
    return [((c + 0.5) / CELLS + rng.uniform(*jitter), (r + 0.5) / CELLS + rng.uniform(*jitter)) for r, c in cells]


def _draw_background(difficulty: Difficulty, rng: SceneRng) -> Background:
    kinds: tuple[BackgroundKind, ...] = ("plain",) if difficulty == "easy" else ("plain", "gradient", "texture")
    kind = rng.choice(kinds)
    # Dark and nearly grey: every object colour is lighter or far more saturated.
    first, second = (_dark_grey(rng) for _ in range(2))
    waves = (2.0, 9.0)
    noise = rng.uniform(2.0, 5.0) if difficulty == "easy" else rng.uniform(3.0, 16.0)
    return Background(
        kind, first, second, rng.uniform(0.0, 2 * math.pi), rng.uniform(*waves), rng.uniform(*waves), noise
    )


def _dark_grey(rng: SceneRng) -> tuple[float, float, float]:
    level = rng.uniform(35.0, 85.0)
    return level + rng.uniform(-10.0, 10.0), level + rng.uniform(-10.0, 10.0), level + rng.uniform(-10.0, 10.0)


WORLD_SEED = 0
"""Seed of the embedded world. It is one fixed data set: the seed of a run does not change it."""
