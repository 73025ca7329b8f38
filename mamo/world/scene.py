"""The world of the embedded data set `scenes`: what is in each picture, as a pure function of an index.

A scene holds a few coloured shapes that never overlap. Difficulty `easy` has 2 to 3 solid objects of 5 shapes, 8
colours and 2 sizes on a nearly plain background; `full` has 2 to 5 objects of 7 shapes, 8 colours, 3 sizes and 3 fill
patterns on plain, gradient or textured backgrounds with noise. Objects stand in the cells of a grid of 3 x 3.

All randomness is Philox, a counter-based generator: its key is (world seed, difficulty) and its counter is (position,
scene index, split, purpose). No two scenes of a world ever read the same block, so a scene can be made alone, in any
order, by any worker, and the splits are disjoint by construction.

Coordinates: `centre_x` is a fraction of the image width and `centre_y` of the image height, both measured from the top
left corner; `radius` is a fraction of the shorter image side. Objects that do not touch in the unit square therefore do
not touch in an image of any aspect ratio.
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
COPY_PROBABILITY = 0.2  # that 3 or more objects repeat a colour and shape on purpose, so that "two red circles" occurs
CELLS = 3  # the centres of objects stand in the middle of a cell of a CELLS x CELLS grid,
CELL_JITTER = 0.018  # give or take this much on each axis: the same part of a shape falls on the same part of a patch
GAP = 0.025  # between the largest objects' circles in neighbouring cells, half of it to the border, in image sides

_DUPLICATE_STREAM = 18  # of the scene's randomness; captions, probes and masked words use lower ones

# Outlines in units of the object's radius, y downwards; all lie inside the circle of radius 1 that keeps objects apart.
CIRCLE_RADIUS = 0.88
SQUARE_HALF = 0.70
CROSS_LONG, CROSS_SHORT = 0.92, 0.30
BAR_LONG, BAR_SHORT = 0.95, 0.30
STAR_INNER = 0.42


def _star_outline() -> tuple[tuple[float, float], ...]:
    spokes = [(1.0 if k % 2 == 0 else STAR_INNER, math.pi * (k / 5 - 0.5)) for k in range(10)]
    return tuple((length * math.cos(angle), length * math.sin(angle)) for length, angle in spokes)


# Only the corners that can touch the bounding box are listed.
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
    """Uniform random numbers of one Philox stream, fetched in blocks because single draws are slow."""

    def __init__(self, seed: int, difficulty: Difficulty, split: Split, index: int, purpose: int) -> None:
        key = seed | DIFFICULTIES.index(difficulty) << 64
        counter = index << 64 | SPLITS.index(split) << 128 | purpose << 192
        self.generator = np.random.Generator(np.random.Philox(counter=counter, key=key))
        self._numbers: Iterator[float] = iter(())

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number, uniform in [low, high)."""
        number = next(self._numbers, None)
        if number is None:
            self._numbers = iter(self.generator.random(32).tolist())
            number = next(self._numbers)
        return low + (high - low) * number

    def pick(self, options: Sequence[Option]) -> Option:
        """One of `options`, uniformly."""
        return options[int(self.uniform() * len(options))]

    def shuffled(self, n: int) -> list[int]:
        """The numbers 0 to n - 1 in random order."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = int(self.uniform() * (i + 1))
            order[i], order[j] = order[j], order[i]
        return order


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape; see the module's docstring for the coordinates. `angle` turns clockwise, in radians."""

    shape: str
    colour: str
    size: str
    pattern: str
    centre_x: float
    centre_y: float
    radius: float
    angle: float

    def box_px(self, image_size_px: tuple[int, int]) -> tuple[float, float, float, float]:
        """The tight box (x, y, width, height) in pixels for an image of [height, width] pixels."""
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
    """What lies behind the objects: colours in sRGB 0 to 255, `angle` in radians, waves in cycles an image side.

    `noise` is the half-width of the uniform noise added to every value of every pixel, in grey levels.
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
    """One picture's ground truth, and the coordinates (seed, difficulty, split, index) it follows from."""

    seed: int
    difficulty: Difficulty
    split: Split
    index: int
    objects: tuple[SceneObject, ...]
    background: Background

    def draws(self, purpose: int) -> SceneRng:
        """A random stream of this scene's own; 0 made the objects, 1 is the pixel noise, 2 and more the captions."""
        return SceneRng(self.seed, self.difficulty, self.split, self.index, purpose)


class SceneWorld:
    """All scenes of one difficulty and seed, at random access: `world.scene("train", 123456)`.

    Raises ValueError for a difficulty that is not "easy" or "full" and for a seed outside 0 to 2**64 - 1.
    """

    def __init__(self, difficulty: Difficulty, seed: int) -> None:
        if difficulty not in DIFFICULTIES:
            raise ValueError(f"scenes: difficulty {difficulty!r} is unknown; use one of {', '.join(DIFFICULTIES)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"scenes: seed {seed} must lie between 0 and 2**64 - 1")
        self.difficulty = difficulty
        self.seed = seed

    def scene(self, split: Split, index: int) -> Scene:
        """The scene at `index` of `split`: a pure function of (difficulty, seed, split, index).

        Raises ValueError for an unknown split and for an index outside 0 to 2**64 - 1.
        """
        if split not in SPLITS:
            raise ValueError(f"scenes: split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        if not 0 <= index < 2**64:
            raise ValueError(f"scenes: index {index} must lie between 0 and 2**64 - 1")
        draws = SceneRng(self.seed, self.difficulty, split, index, purpose=0)
        background = _draw_background(self.difficulty, draws)
        return Scene(self.seed, self.difficulty, split, index, _draw_objects(self.difficulty, draws), background)


def near_duplicate(scene: Scene) -> Scene:
    """`scene` with another shape, colour or fill pattern of one of its objects, as a retrieval distractor.

    Places, sizes, background and noise stay; its captions are worded alike, and an identifying one names the change.
    """
    draws = scene.draws(_DUPLICATE_STREAM)
    options = {"shape": SHAPES[scene.difficulty], "colour": tuple(COLOURS), "pattern": PATTERNS[scene.difficulty]}
    attribute = draws.pick([name for name, values in options.items() if len(values) > 1])
    which = int(draws.uniform() * len(scene.objects))
    thing = scene.objects[which]
    others = [value for value in options[attribute] if value != getattr(thing, attribute)]
    changed = replace(thing, **{attribute: draws.pick(others)})  # type: ignore[arg-type]
    return replace(scene, objects=(*scene.objects[:which], changed, *scene.objects[which + 1 :]))


def _draw_objects(difficulty: Difficulty, draws: SceneRng) -> tuple[SceneObject, ...]:
    n = draws.pick(N_OBJECTS[difficulty])
    colour_names = tuple(COLOURS)
    size_names = tuple(SIZES[difficulty])
    looks = [(draws.pick(SHAPES[difficulty]), draws.pick(colour_names)) for _ in range(n)]
    if n > 2 and draws.uniform() < COPY_PROBABILITY:
        looks[-1] = looks[0]  # the order of objects means nothing: every caption shuffles it
    sizes = [draws.pick(size_names) for _ in range(n)]
    patterns = [draws.pick(PATTERNS[difficulty]) for _ in range(n)]
    radii = [draws.uniform(*SIZES[difficulty][size]) for size in sizes]
    angles = [draws.uniform(-MAX_ANGLE[difficulty], MAX_ANGLE[difficulty]) for _ in range(n)]
    centres = _place_in_cells(n, draws)
    return tuple(
        SceneObject(shape, colour, size, pattern, x, y, radius, angle)
        for (shape, colour), size, pattern, (x, y), radius, angle in zip(
            looks, sizes, patterns, centres, radii, angles, strict=True
        )
    )


def _place_in_cells(n: int, draws: SceneRng) -> list[tuple[float, float]]:
    """Centres in `n` cells of the grid; the largest objects keep `GAP` between them."""
    cells = [divmod(cell, CELLS) for cell in draws.shuffled(CELLS * CELLS)[:n]]
    jitter = (-CELL_JITTER, CELL_JITTER)
    return [((c + 0.5) / CELLS + draws.uniform(*jitter), (r + 0.5) / CELLS + draws.uniform(*jitter)) for r, c in cells]


def _draw_background(difficulty: Difficulty, draws: SceneRng) -> Background:
    kinds: tuple[BackgroundKind, ...] = ("plain",) if difficulty == "easy" else ("plain", "gradient", "texture")
    kind = draws.pick(kinds)
    # Dark and nearly grey: every object colour is either lighter or far more saturated.
    first, second = (_dark_grey(draws) for _ in range(2))
    waves = (2.0, 9.0)
    noise = draws.uniform(2.0, 5.0) if difficulty == "easy" else draws.uniform(3.0, 16.0)
    return Background(
        kind, first, second, draws.uniform(0.0, 2 * math.pi), draws.uniform(*waves), draws.uniform(*waves), noise
    )


def _dark_grey(draws: SceneRng) -> tuple[float, float, float]:
    level = draws.uniform(35.0, 85.0)
    return level + draws.uniform(-10.0, 10.0), level + draws.uniform(-10.0, 10.0), level + draws.uniform(-10.0, 10.0)


WORLD_SEED = 0
"""The embedded world is one fixed data set; a run's seed changes the run, not the world."""
