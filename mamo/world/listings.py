"""Listings of items, and pairs of listings: of the same item, or of an item and its near miss.

An item is the content of a scene: shapes, colours, sizes and patterns of its objects. A listing is an image of the item
and a text of its attributes. Each listing renders the item again: another background, other angles, other noise, at
times mirrored. The text mentions the objects in random order and omits some attributes. The image or the text may be
missing or wrong. A wrong one belongs to the other item of the pair, which differs in one attribute of one object.

A pair is a pure function of (difficulty, seed, split, index). The split of an item depends only on its content, so no
item and no near miss is in two splits. Disjoint random streams would not guarantee this: small items repeat by chance.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

from mamo.world.grammar import Draft, Statement, describe, keep_attributes, write
from mamo.world.scene import MAX_ANGLE, Scene, SceneRng, SceneWorld, Split, near_duplicate

MATCH_SHARE = 0.5
"""Share of the pairs that are of one item."""
Fault = Literal["", "no image", "no text", "wrong image", "wrong text"]
FAULT_SHARES: tuple[tuple[Fault, float], ...] = (
    ("no image", 0.1), ("no text", 0.1), ("wrong image", 0.05), ("wrong text", 0.05),
)  # fmt: skip
"""Share of the listings with each fault. No listing has two."""
MENTION_SHARE = 0.8
"""Probability that a text mentions an attribute. The shape or the colour of an object is always mentioned."""

_SPLITS: tuple[Split, ...] = ("train", "train", "val", "test")  # of four equal parts of all items
_ATTEMPTS_BITS = 20  # of a scene index: number of the attempt to find a pair
_STREAM = 23  # random stream of a scene

Item = tuple[tuple[str, ...], ...]
"""Sorted (shape, colour, size, pattern) of the objects."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A listing of `item`. `image` (a scene to render) and `text` may be of another item; None and "" if missing."""

    item: Item
    image: Scene | None
    text: str


@dataclass(frozen=True, slots=True)
class ListingPair:
    """Two listings; `is_match` if they are of the same item."""

    first: Listing
    second: Listing
    is_match: bool


def item_of(scene: Scene) -> Item:
    """Return the item of a scene: its objects without places, angles and background."""
    return tuple(sorted((obj.shape, obj.colour, obj.size, obj.pattern) for obj in scene.objects))


def split_of(item: Item) -> Split:
    """Return the split of an item: "train" for half of all items, "val" and "test" for a quarter each."""
    digest = hashlib.blake2b(repr(item).encode(), digest_size=8).digest()
    return _SPLITS[int.from_bytes(digest, "big") % len(_SPLITS)]


def listing_pair(world: SceneWorld, split: Split, index: int) -> ListingPair:
    """Return pair `index` of a split: a listing of an item, and one of the same item or of its near miss.

    Both items belong to the split.

    Raises:
        ValueError: the split is unknown or the index is outside 0 to 2**44 - 1.
    """
    if not 0 <= index < 2 ** (64 - _ATTEMPTS_BITS):
        raise ValueError(f"listings: index {index} must be between 0 and 2**{64 - _ATTEMPTS_BITS} - 1")
    for attempt in itertools.count():
        scene = world.scene(split, index << _ATTEMPTS_BITS | attempt)
        miss = near_duplicate(scene)
        if split_of(item_of(scene)) == split_of(item_of(miss)) == split:
            break
    rng = scene.rng(_STREAM)
    is_match = rng.uniform() < MATCH_SHARE
    backgrounds = [world.scene(split, (index << _ATTEMPTS_BITS) + 2 ** (_ATTEMPTS_BITS - 1) + k) for k in range(2)]
    first = _listing(scene, miss, backgrounds[0], rng)
    second = _listing(scene, miss, backgrounds[1], rng) if is_match else _listing(miss, scene, backgrounds[1], rng)
    return ListingPair(first, second, is_match)


def _listing(scene: Scene, other: Scene, background: Scene, rng: SceneRng) -> Listing:
    """Draw a listing of the item of `scene`. A wrong image or text is that of `other`."""
    fault = _fault(rng)
    image = _photograph(other if fault == "wrong image" else scene, background, rng)
    text = _attributes(other if fault == "wrong text" else scene, rng)
    return Listing(item_of(scene), None if fault == "no image" else image, "" if fault == "no text" else text)


def _fault(rng: SceneRng) -> Fault:
    """Draw a fault with the probabilities `FAULT_SHARES`; "" for none."""
    u = rng.uniform()
    for fault, share in FAULT_SHARES:
        if u < share:
            return fault
        u -= share
    return ""


def _photograph(scene: Scene, background: Scene, rng: SceneRng) -> Scene:
    """Return the objects at new angles, half of the time mirrored, on the background and noise of another scene."""
    is_mirrored, limit = rng.uniform() < 0.5, MAX_ANGLE[scene.difficulty]
    objs = (
        replace(
            obj,
            centre_x=1 - obj.centre_x if is_mirrored else obj.centre_x,
            angle=math.copysign(rng.uniform(0, limit), rng.uniform(-1, 1)),
        )
        for obj in scene.objects
    )
    return replace(background, objects=tuple(objs))


def _attributes(scene: Scene, rng: SceneRng) -> str:
    """Write the objects in random order with most of their attributes: "a small red circle, a blue ring"."""
    order = rng.permutation(len(scene.objects))
    mentions = []
    for k in order:
        description = describe(scene, scene.objects[k])
        names = ("size", "pattern", "colour", "shape")
        mentioned = [name for name in names if getattr(description, name) and rng.uniform() < MENTION_SHARE]
        if not {"colour", "shape"} & {*mentioned}:
            mentioned.append(rng.choice(("colour", "shape")))
        mentions.append(keep_attributes(description, *mentioned))
    template = ", ".join(f"{{m{k}}}" for k in range(len(mentions)))
    draft = Draft(Statement(tuple(mentions)), template, tuple(order), int(rng.uniform() * 2), 0)
    return write(draft, scene.objects).text
