"""Probes of fine-grained understanding: a true caption of a scene and a foil that differs by one word or one swap.

A foil has the wording of the true caption. It describes a scene of equal probability (mirrored, or with two colours
exchanged, and so on) and is verified to be false of its own scene. The text therefore does not reveal the true caption:
a scorer that ignores the image is right half of the time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from mamo.config.values import Values
from mamo.data.items import Item
from mamo.world.captions import COUNTING, caption_draft
from mamo.world.grammar import OPPOSITE, Description, Draft, is_true, write
from mamo.world.scene import N_OBJECTS, Scene, SceneObject, SceneRng, SceneWorld, Split, attribute_values

PROBES = ("attribute_swap", "relation_swap", "count_change", "attribute_replacement", "object_replacement")
ATTRIBUTES = ("colour", "size", "pattern")
_DESCRIBING = (0, 1, 2)  # captions that describe objects
_WITHOUT_PLACES = (0, 2)  # of these, captions without places, from which relations would follow
_STREAM = 16  # random stream of the scene
_MAX_SCENES_PER_ITEM = 200

HasAttributes = TypeVar("HasAttributes", Description, SceneObject)


@dataclass(frozen=True, slots=True)
class ProbeItem:
    """A caption that is true of scene `scene_index` of the split, and a foil that is false of it."""

    scene_index: int
    caption: str
    foil: str

    def as_item(self, probe: str) -> Item:
        """Return the item of a fine-grained benchmark; its image is named by the index of the scene."""
        name = str(self.scene_index)
        return Item(images=[name], texts=[self.caption, self.foil], right=[(0, 0)], group=probe, id=f"{probe}/{name}")


def probe_items(world: SceneWorld, probe: str, n_items: int = 1000, split: Split = "test") -> list[ProbeItem]:
    """Return the first `n_items` items of a probe, at most one a scene; a pure function.

    | probe | change from caption to foil |
    |---|---|
    | attribute_swap | two objects exchange their colour, size or pattern word |
    | relation_swap | left and right, or above and below, are exchanged |
    | count_change | a number is one higher or lower |
    | attribute_replacement | another colour, size or pattern word |
    | object_replacement | another shape word |

    Scenes without a suitable caption are skipped.

    Raises:
        ValueError: `probe` is not in `PROBES`.
    """
    if probe not in PROBES:
        raise ValueError(f"probes: {probe!r} is unknown; use one of {', '.join(PROBES)}")
    items: list[ProbeItem] = []
    waiting: dict[tuple[object, object], list[ProbeItem]] = {}  # count changes without their opposite so far
    for index in range(_MAX_SCENES_PER_ITEM * n_items):
        if len(items) >= n_items:
            break
        scene = world.scene(split, index)
        pair = _MAKERS[probe](scene, scene.rng(_STREAM))
        if pair is None or is_true(pair[1].statement, scene.objects, margin=0.0):
            continue
        true, foil = pair
        item = ProbeItem(index, write(true, scene.objects).text, write(foil, scene.objects).text)
        if probe != "count_change":
            items.append(item)
            continue
        # Counts differ in frequency, so items are added in pairs with the same wording: one with "two" as the caption
        # and "three" as the foil, and one with "three" as the caption and "two" as the foil.
        direction = (_wording(true), _wording(foil))
        if waiting.get(direction[::-1]):
            items += [waiting[direction[::-1]].pop(0), item]
        else:
            waiting.setdefault(direction, []).append(item)
    assert len(items) >= n_items, (probe, len(items))
    return items[:n_items]


def one_word_foil(scene: Scene, true: Draft, rng: SceneRng) -> Draft | None:
    """Return a foil of a caption that differs in one word, by the rules of the probes; None if there is none.

    The word is an attribute, a shape, a relation or a number. The foil is false of the scene.
    """
    rules = (_replace_attribute_of, _replace_object_of, _swap_relation_of, _change_count_of)
    for k in rng.permutation(len(rules)):
        pair = rules[k](scene, true, rng)
        if pair is not None and not is_true(pair[1].statement, scene.objects, margin=0.0):
            return pair[1]
    return None


def _swap_attribute(scene: Scene, rng: SceneRng) -> tuple[Draft, Draft] | None:
    """Exchange an attribute of two mentions. As all makers: return (caption, foil), or None if it is not possible."""
    true = caption_draft(scene, rng.choice(_DESCRIBING))
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
    attribute, a, b = rng.choice(options)
    return _change_attribute(
        scene, true, attribute, {a: getattr(mentions[b], attribute), b: getattr(mentions[a], attribute)}
    )


def _replace_attribute(scene: Scene, rng: SceneRng) -> tuple[Draft, Draft] | None:
    """Replace the colour, size or pattern of a mention."""
    return _replace_attribute_of(scene, caption_draft(scene, rng.choice(_DESCRIBING)), rng)


def _replace_object(scene: Scene, rng: SceneRng) -> tuple[Draft, Draft] | None:
    """Replace the shape of a mention."""
    return _replace_object_of(scene, caption_draft(scene, rng.choice(_DESCRIBING)), rng)


def _replace_attribute_of(scene: Scene, true: Draft, rng: SceneRng) -> tuple[Draft, Draft] | None:
    return _replace_word(scene, true, rng, ATTRIBUTES)


def _replace_object_of(scene: Scene, true: Draft, rng: SceneRng) -> tuple[Draft, Draft] | None:
    return _replace_word(scene, true, rng, ("shape",))


def _replace_word(scene: Scene, true: Draft, rng: SceneRng, attributes: tuple[str, ...]) -> tuple[Draft, Draft] | None:
    options = [
        (attribute, k)
        for attribute in attributes
        for k, mention in enumerate(true.statement.mentions)
        if getattr(mention, attribute)
    ]
    if not options:
        return None
    attribute, k = rng.choice(options)
    values = attribute_values(attribute, scene.difficulty)
    others = [value for value in values if value != getattr(true.statement.mentions[k], attribute)]
    return _change_attribute(scene, true, attribute, {k: rng.choice(others)})


def _change_attribute(scene: Scene, true: Draft, attribute: str, values: dict[int, str]) -> tuple[Draft, Draft] | None:
    """Change `attribute` of the mentions in `values`; None if the scene of the foil has another probability.

    The world repeats a colour and shape on purpose, so the change must neither create nor remove a repetition.
    """
    objects = list(scene.objects)
    mentions = list(true.statement.mentions)
    for k, value in values.items():
        mentions[k] = _with_attribute(mentions[k], attribute, value)
        objects[true.referents[k]] = _with_attribute(objects[true.referents[k]], attribute, value)
    if _repetitions(objects) != _repetitions(scene.objects):
        return None
    return true, replace(true, statement=replace(true.statement, mentions=tuple(mentions)))


def _with_attribute(obj: HasAttributes, attribute: str, value: str) -> HasAttributes:
    changes: Values = {attribute: value}  # Any: other fields of an object are numbers
    return replace(obj, **changes)


def _repetitions(objects: tuple[SceneObject, ...] | list[SceneObject]) -> list[int]:
    return sorted(Counter((obj.colour, obj.shape) for obj in objects).values())


def _swap_relation(scene: Scene, rng: SceneRng) -> tuple[Draft, Draft] | None:
    """Replace a spatial relation by its opposite."""
    captions = _WITHOUT_PLACES if scene.difficulty == "full" else _DESCRIBING
    return _swap_relation_of(scene, caption_draft(scene, rng.choice(captions)), rng)


def _swap_relation_of(scene: Scene, true: Draft, rng: SceneRng) -> tuple[Draft, Draft] | None:
    relations = true.statement.relations
    # Two relations along one axis are not independent: "left of b and left of c" is more probable than "left of b and
    # right of c". A single relation is as probable as its mirror image.
    along_x = [k for k, relation in enumerate(relations) if relation.kind in ("left", "right")]
    along_y = [k for k, relation in enumerate(relations) if relation.kind in ("above", "below")]
    options = [axis[0] for axis in (along_x, along_y) if len(axis) == 1]
    if not options:
        return None
    k = rng.choice(options)
    swapped = replace(relations[k], kind=OPPOSITE[relations[k].kind])
    changed = (*relations[:k], swapped, *relations[k + 1 :])
    return true, replace(true, statement=replace(true.statement, relations=changed))


def _change_count(scene: Scene, rng: SceneRng) -> tuple[Draft, Draft] | None:
    """Increase or decrease a number by one."""
    return _change_count_of(scene, caption_draft(scene, COUNTING), rng)


def _change_count_of(scene: Scene, true: Draft, rng: SceneRng) -> tuple[Draft, Draft] | None:
    counts = true.statement.counts
    if not counts:
        return None
    k = int(rng.uniform() * len(counts))
    number = counts[k].number + rng.choice((-1, 1))
    # "{c0}" writes "two circles"; "one circle" would also change the noun.
    least = 2 if f"{{c{k}}}" in true.template else 1
    if not least <= min(number, counts[k].number) or number > max(N_OBJECTS[scene.difficulty]):
        return None
    changed = (*counts[:k], replace(counts[k], number=number), *counts[k + 1 :])
    return true, replace(true, statement=replace(true.statement, counts=changed))


def _wording(draft: Draft) -> tuple[object, ...]:
    """Return a counting caption without its words: the template and, of each count, number and mentioned attributes."""
    counts = tuple(
        (count.number, *(bool(getattr(count.description, attribute)) for attribute in ("shape", *ATTRIBUTES)))
        for count in draft.statement.counts
    )
    return draft.template, counts


_MAKERS: dict[str, Callable[[Scene, SceneRng], tuple[Draft, Draft] | None]] = {
    "attribute_swap": _swap_attribute,
    "relation_swap": _swap_relation,
    "count_change": _change_count,
    "attribute_replacement": _replace_attribute,
    "object_replacement": _replace_object,
}
