"""Probes of fine-grained understanding: a true caption of a scene against a foil that differs by one word or one swap.

A foil describes a scene that the world makes exactly as often as the true one (the mirrored one, the one with two
colours exchanged, and so on) in the same wording, and is verified false of its own scene. Which of the two is true can
therefore not be told from the text: a scorer that sees no image is right half of the time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mamo.world.captions import caption_draft
from mamo.world.grammar import OPPOSITE, Description, Draft, is_true, write
from mamo.world.scene import (
    COLOURS,
    N_OBJECTS,
    PATTERNS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    SceneRng,
    SceneWorld,
    Split,
)

PROBES = ("attribute_swap", "relation_swap", "count_change", "attribute_replacement", "object_replacement")
ATTRIBUTES = ("colour", "size", "pattern")
_DESCRIBING = (0, 1, 2)  # the captions that describe objects
_PLACES_UNSAID = (0, 2)  # those of them whose relations do not follow from places that they say
_COUNTING = 3  # the caption that counts
_STREAM = 16  # of the scene's randomness; the captions use lower ones
_MAX_SCENES_PER_ITEM = 200

Thing = TypeVar("Thing", Description, SceneObject)


@dataclass(frozen=True, slots=True)
class ProbeItem:
    """`caption` is true of the scene at `scene_index` of the probed split, and `foil` is false of it."""

    scene_index: int
    caption: str
    foil: str


def probe_items(world: SceneWorld, probe: str, n_items: int = 1000, split: Split = "test") -> list[ProbeItem]:
    """`n_items` items of one of `PROBES`, from the lowest scene indices of `split` that allow one; a pure function.

    attribute_swap: two objects exchange their colour, size or pattern word. relation_swap: left for right, above for
    below. count_change: a number one higher or lower. attribute_replacement: another colour, size or pattern word.
    object_replacement: another shape word. A scene gives at most one item.
    Raises ValueError where `probe` is unknown.
    """
    if probe not in PROBES:
        raise ValueError(f"probes: {probe!r} is unknown; use one of {', '.join(PROBES)}")
    items: list[ProbeItem] = []
    waiting: dict[tuple[object, object], list[ProbeItem]] = {}  # count changes whose opposite has not come yet
    for index in range(_MAX_SCENES_PER_ITEM * n_items):
        if len(items) >= n_items:
            break
        scene = world.scene(split, index)
        pair = _MAKERS[probe](scene, scene.draws(_STREAM))
        if pair is None or is_true(pair[1].statement, scene.objects, margin=0.0):
            continue
        true, foil = pair
        item = ProbeItem(index, write(true, scene.objects).text, write(foil, scene.objects).text)
        if probe != "count_change":
            items.append(item)
            continue
        # Some counts are more frequent than others, so items come in pairs: one "two ..." against "three ..." for
        # every "three ..." against "two ..." of the same wording.
        direction = (_wording(true), _wording(foil))
        if waiting.get(direction[::-1]):
            items += [waiting[direction[::-1]].pop(0), item]
        else:
            waiting.setdefault(direction, []).append(item)
    assert len(items) >= n_items, (probe, len(items))
    return items[:n_items]


def _swap_attribute(scene: Scene, draws: SceneRng) -> tuple[Draft, Draft] | None:
    true = caption_draft(scene, draws.pick(_DESCRIBING))
    mentions = true.statement.mentions
    options = [
        (attribute, a, b)
        for attribute in ATTRIBUTES
        for b in range(len(mentions))
        for a in range(b)
        if "" != getattr(mentions[a], attribute) != getattr(mentions[b], attribute) != ""
    ]
    if not options:
        return None
    attribute, a, b = draws.pick(options)
    return _described_otherwise(
        scene, true, attribute, {a: getattr(mentions[b], attribute), b: getattr(mentions[a], attribute)}
    )


def _replace_attribute(scene: Scene, draws: SceneRng) -> tuple[Draft, Draft] | None:
    return _replace_word(scene, draws, ATTRIBUTES)


def _replace_object(scene: Scene, draws: SceneRng) -> tuple[Draft, Draft] | None:
    return _replace_word(scene, draws, ("shape",))


def _replace_word(scene: Scene, draws: SceneRng, attributes: tuple[str, ...]) -> tuple[Draft, Draft] | None:
    true = caption_draft(scene, draws.pick(_DESCRIBING))
    options = [
        (attribute, k)
        for attribute in attributes
        for k, mention in enumerate(true.statement.mentions)
        if getattr(mention, attribute)
    ]
    if not options:
        return None
    attribute, k = draws.pick(options)
    values = {
        "shape": SHAPES[scene.difficulty],
        "colour": tuple(COLOURS),
        "size": tuple(SIZES[scene.difficulty]),
        "pattern": PATTERNS[scene.difficulty],
    }[attribute]
    others = [value for value in values if value != getattr(true.statement.mentions[k], attribute)]
    return _described_otherwise(scene, true, attribute, {k: draws.pick(others)})


def _described_otherwise(
    scene: Scene, true: Draft, attribute: str, values: dict[int, str]
) -> tuple[Draft, Draft] | None:
    """`true` with `attribute` of some mentions changed; None where the world makes such a scene more or less often.

    It prefers scenes in which a colour and shape repeat, so a change must neither make nor break a repetition.
    """
    objects = list(scene.objects)
    mentions = list(true.statement.mentions)
    for k, value in values.items():
        mentions[k] = _with(mentions[k], attribute, value)
        objects[true.referents[k]] = _with(objects[true.referents[k]], attribute, value)
    if _repetitions(objects) != _repetitions(scene.objects):
        return None
    return true, replace(true, statement=replace(true.statement, mentions=tuple(mentions)))


def _with(thing: Thing, attribute: str, value: str) -> Thing:
    changes: dict[str, Any] = {attribute: value}  # Any: the other fields of an object are numbers
    return replace(thing, **changes)


def _repetitions(objects: tuple[SceneObject, ...] | list[SceneObject]) -> list[int]:
    return sorted(Counter((thing.colour, thing.shape) for thing in objects).values())


def _swap_relation(scene: Scene, draws: SceneRng) -> tuple[Draft, Draft] | None:
    true = caption_draft(scene, draws.pick(_PLACES_UNSAID if scene.difficulty == "full" else _DESCRIBING))
    relations = true.statement.relations
    # Two relations along one axis depend on each other ("left of b and left of c" is likelier than "left of b and right
    # of c"); one alone is as likely as its mirror image.
    along_x = [k for k, relation in enumerate(relations) if relation.kind in ("left", "right")]
    along_y = [k for k, relation in enumerate(relations) if relation.kind in ("above", "below")]
    options = [axis[0] for axis in (along_x, along_y) if len(axis) == 1]
    if not options:
        return None
    k = draws.pick(options)
    swapped = replace(relations[k], kind=OPPOSITE[relations[k].kind])
    changed = (*relations[:k], swapped, *relations[k + 1 :])
    return true, replace(true, statement=replace(true.statement, relations=changed))


def _change_count(scene: Scene, draws: SceneRng) -> tuple[Draft, Draft] | None:
    true = caption_draft(scene, _COUNTING)
    counts = true.statement.counts
    k = int(draws.uniform() * len(counts))
    number = counts[k].number + draws.pick((-1, 1))
    # "{c0}" writes "two circles": one word more would change with "one circle".
    least = 2 if f"{{c{k}}}" in true.template else 1
    if not least <= min(number, counts[k].number) or number > max(N_OBJECTS[scene.difficulty]):
        return None
    changed = (*counts[:k], replace(counts[k], number=number), *counts[k + 1 :])
    return true, replace(true, statement=replace(true.statement, counts=changed))


def _wording(draft: Draft) -> tuple[object, ...]:
    """A counting caption without its attribute words: the template and, of each count, the number and what is said."""
    said = tuple(
        (count.number, *(bool(getattr(count.what, attribute)) for attribute in ("shape", *ATTRIBUTES)))
        for count in draft.statement.counts
    )
    return draft.template, said


_MAKERS: dict[str, Callable[[Scene, SceneRng], tuple[Draft, Draft] | None]] = {
    "attribute_swap": _swap_attribute,
    "relation_swap": _swap_relation,
    "count_change": _change_count,
    "attribute_replacement": _replace_attribute,
    "object_replacement": _replace_object,
}
