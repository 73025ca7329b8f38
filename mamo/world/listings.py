"""The embedded catalogue: listings of items, and pairs of listings that are of the same item or a near miss.

An item is what a scene shows: its objects' shapes, colours, sizes and patterns. A listing is a picture of the item and
a text of its attributes. The picture is taken anew for each listing: another background, other angles, other noise, at
times mirrored. The text names the objects in random order and leaves some attributes out. Either may be
missing, or wrong: a wrong one is that of the pair's other item, which differs in one attribute of one object.

A pair is a pure function of (difficulty, seed, split, index). Which split an item belongs to is decided by its content
alone, so that no item, and no near miss of a pair, is in two splits: streams of random numbers that never meet would
not see to that, since small items come up again by chance.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

from mamo.world.grammar import Draft, Statement, describe, only, write
from mamo.world.scene import MAX_ANGLE, Scene, SceneRng, SceneWorld, Split, near_duplicate

MATCH_SHARE = 0.5
"""How many pairs are of one item."""
Fault = Literal["", "no image", "no text", "wrong image", "wrong text"]
FAULT_SHARES: tuple[tuple[Fault, float], ...] = (
    ("no image", 0.1), ("no text", 0.1), ("wrong image", 0.05), ("wrong text", 0.05),
)  # fmt: skip
"""How many listings have a fault; none has two."""
SAID_SHARE = 0.8
"""How many attributes of an object a text gives; its shape or its colour is always there."""

_SPLITS: tuple[Split, ...] = ("train", "train", "val", "test")  # an item belongs to one of four equal parts
_ATTEMPTS_BITS = 20  # of a scene's index: which attempt at a pair
_STREAM = 23  # of a scene's randomness; everything else uses lower ones

Item = tuple[tuple[str, ...], ...]
"""The sorted (shape, colour, size, pattern) of its objects."""


@dataclass(frozen=True, slots=True)
class Listing:
    """`image` (to be rendered) and `text` are what is given, whichever item that shows; None and "" where missing."""

    item: Item
    image: Scene | None
    text: str


@dataclass(frozen=True, slots=True)
class ListingPair:
    """Two listings, and whether they are of the same item."""

    first: Listing
    second: Listing
    is_match: bool


def item_of(scene: Scene) -> Item:
    """What the scene shows, apart from where and before what."""
    return tuple(sorted((thing.shape, thing.colour, thing.size, thing.pattern) for thing in scene.objects))


def split_of(item: Item) -> Split:
    """The split that an item belongs to: half of all items are in "train", a quarter each in "val" and "test"."""
    digest = hashlib.blake2b(repr(item).encode(), digest_size=8).digest()
    return _SPLITS[int.from_bytes(digest, "big") % len(_SPLITS)]


def listing_pair(world: SceneWorld, split: Split, index: int) -> ListingPair:
    """Pair `index` of a split: an item, and a second listing of it or of its near miss, both items of the split.

    Raises ValueError for an unknown split and for an index outside 0 to 2**44 - 1.
    """
    if not 0 <= index < 2 ** (64 - _ATTEMPTS_BITS):
        raise ValueError(f"catalogue: index {index} must lie between 0 and 2**{64 - _ATTEMPTS_BITS} - 1")
    for attempt in itertools.count():
        scene = world.scene(split, index << _ATTEMPTS_BITS | attempt)
        miss = near_duplicate(scene)
        if split_of(item_of(scene)) == split_of(item_of(miss)) == split:
            break
    draws = scene.draws(_STREAM)
    is_match = draws.uniform() < MATCH_SHARE
    backgrounds = [world.scene(split, (index << _ATTEMPTS_BITS) + 2 ** (_ATTEMPTS_BITS - 1) + k) for k in range(2)]
    first = _listing(scene, miss, backgrounds[0], draws)
    second = _listing(scene, miss, backgrounds[1], draws) if is_match else _listing(miss, scene, backgrounds[1], draws)
    return ListingPair(first, second, is_match)


def _listing(scene: Scene, other: Scene, before: Scene, draws: SceneRng) -> Listing:
    """A listing of the scene's item; where something is wrong, it is the other scene's."""
    fault = _fault(draws)
    image = _photograph(other if fault == "wrong image" else scene, before, draws)
    text = _attributes(other if fault == "wrong text" else scene, draws)
    return Listing(item_of(scene), None if fault == "no image" else image, "" if fault == "no text" else text)


def _fault(draws: SceneRng) -> Fault:
    fate = draws.uniform()
    for fault, share in FAULT_SHARES:
        if fate < share:
            return fault
        fate -= share
    return ""


def _photograph(scene: Scene, before: Scene, draws: SceneRng) -> Scene:
    """The scene's objects at new angles before another scene's background and noise, half of the time mirrored."""
    is_mirrored, limit = draws.uniform() < 0.5, MAX_ANGLE[scene.difficulty]
    things = (
        replace(
            thing,
            centre_x=1 - thing.centre_x if is_mirrored else thing.centre_x,
            angle=math.copysign(draws.uniform(0, limit), draws.uniform(-1, 1)),
        )
        for thing in scene.objects
    )
    return replace(before, objects=tuple(things))


def _attributes(scene: Scene, draws: SceneRng) -> str:
    """ "a small red circle, a blue ring": the objects in random order, with most of their attributes."""
    order = draws.shuffled(len(scene.objects))
    mentions = []
    for k in order:
        what = describe(scene, scene.objects[k])
        names = ("size", "pattern", "colour", "shape")
        said = [name for name in names if getattr(what, name) and draws.uniform() < SAID_SHARE]
        if not {"colour", "shape"} & {*said}:
            said.append(draws.pick(("colour", "shape")))
        mentions.append(only(what, *said))
    template = ", ".join(f"{{m{k}}}" for k in range(len(mentions)))
    draft = Draft(Statement(tuple(mentions)), template, tuple(order), int(draws.uniform() * 2), 0)
    return write(draft, scene.objects).text
