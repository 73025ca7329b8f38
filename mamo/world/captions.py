"""Captions of a scene: five of different kinds, and one that identifies it. All are pure functions of the scene."""

from collections.abc import Callable
from dataclasses import replace

from mamo.world.grammar import (
    OPPOSITE,
    RELATION_WORDINGS,
    Caption,
    Count,
    Description,
    Draft,
    Relation,
    Statement,
    describe,
    keep_attributes,
    place_of,
    relation_holds,
    sides_of,
    write,
)
from mamo.world.scene import Scene, SceneObject, SceneRng

N_CAPTIONS = 5
PLACING = 1  # caption of the full world that mentions places
COUNTING = 3  # caption with exact counts
PLACE_PROBABILITY = 0.75  # of mentioning the place, for each of the two objects of caption `PLACING`
SIDE_PROBABILITY = 0.5  # of naming a side ("left of the centre") instead of a cell, for an object off the centre
TOTAL_OPENINGS = ("", "there are", "exactly")

_FIRST_CAPTION_STREAM = 2  # streams 0 and 1 of a scene are its objects and its pixel noise
_IDENTIFYING_STREAM = _FIRST_CAPTION_STREAM + N_CAPTIONS


def all_captions(scene: Scene) -> tuple[Caption, ...]:
    """Return the five captions of the scene, see `caption`."""
    return tuple(caption(scene, caption_index) for caption_index in range(N_CAPTIONS))


def caption(scene: Scene, caption_index: int) -> Caption:
    """Write caption `caption_index` of `scene`; a pure function of both.

    Captions 0 and 1 describe all objects, 2 relates two objects, 3 counts, 4 compares two objects. In the full world
    caption 1 relates two objects and mentions where some of them are: by a cell, or by a side of the centre in the
    words of relations. "[MASK] of the centre" can be predicted from one object. Learning it helps with "[MASK] of"
    another object, which needs two objects. For a scene with one object (see `minimal_pairs.training_scene`) every
    caption describes this object and its place.

    Raises:
        ValueError: `caption_index` is not in 0 to 4.
    """
    return write(caption_draft(scene, caption_index), scene.objects)


def identifying_caption(scene: Scene) -> Caption:
    """Write the retrieval caption: all objects, all attributes and some relations. Hardly any other scene matches it.

    The wording is that of captions 0 and 1. With two objects the caption also states their number, because other
    scenes may contain the same pair.
    """
    return write(identifying_draft(scene), scene.objects)


def identifying_draft(scene: Scene) -> Draft:
    """Return the draft of `identifying_caption`."""
    if len(scene.objects) == 1:
        return _describe_single(scene, scene.rng(_IDENTIFYING_STREAM))
    return _full(scene, scene.rng(_IDENTIFYING_STREAM), total_probability=0.0)


def caption_draft(scene: Scene, caption_index: int) -> Draft:
    """Return the draft of caption `caption_index`, see `caption`. The probes change it to make foils."""
    if not 0 <= caption_index < N_CAPTIONS:
        raise ValueError(f"scenes: caption {caption_index} does not exist; use 0 to {N_CAPTIONS - 1}")
    rng = scene.rng(_FIRST_CAPTION_STREAM + caption_index)
    if len(scene.objects) == 1:
        return _describe_single(scene, rng)
    if caption_index == PLACING and scene.difficulty == "full":
        return _relate_with_places(scene, rng)
    if caption_index < 2:
        return _full(scene, rng, total_probability=0.25)
    makers: tuple[Callable[[Scene, SceneRng], Draft], ...] = (_partial, _counting, _comparing)
    return makers[caption_index - 2](scene, rng)


def _spatial_relations(scene: Scene, a: int, b: int) -> list[str]:
    """Return the true spatial relations from object `a` to `b`, largest distance first; never empty."""
    first, second = scene.objects[a], scene.objects[b]
    dx, dy = first.centre_x - second.centre_x, first.centre_y - second.centre_y
    kinds = ["left" if dx < 0 else "right", "above" if dy < 0 else "below"]
    if abs(dy) > abs(dx):
        kinds.reverse()
    return [kind for kind in kinds if relation_holds(kind, first, second)]


def _full(scene: Scene, rng: SceneRng, total_probability: float) -> Draft:
    """Describe all objects with all attributes and some relations, at times with their total number."""
    order = rng.permutation(len(scene.objects))
    wordings = [_random_style(rng) for _ in range(3)]
    relations: list[Relation] = []

    def relate(a: int, b: int, limit: int = 1) -> list[str]:
        found = _spatial_relations(scene, order[a], order[b])[:limit]
        start = len(relations)
        relations.extend(Relation(kind, a, b, wordings[start + k]) for k, kind in enumerate(found))
        return [f"{{r{start + k}}}" for k in range(len(found))]

    n = len(order)
    if n == 2:
        template = f"{{m0}} {' and '.join(relate(0, 1, limit=2))} {{m1}}"
    elif n == 4:
        link = rng.choice(("", " is"))
        template = f"{{m0}}{link} {relate(0, 1)[0]} {{m1}}, and {{m2}}{link} {relate(2, 3)[0]} {{m3}}"
    else:  # "a ... left of b ... and above c ..." relates a to both
        template = f"{{m0}} {relate(0, 1)[0]} {{m1}} and {relate(0, 2)[0]} {{m2}}"
        if n == 5:
            template += f", and {{m3}} {relate(3, 4)[0]} {{m4}}"
    counts: tuple[Count, ...] = ()
    if n == 2 or (n < 5 and rng.uniform() < total_probability):
        counts = (Count(Description(), n),)
        opening = rng.choice(TOTAL_OPENINGS) if n == 2 else ""  # with more objects the caption would be too long
        template = f"{opening} {{c0}}: {template}"
    elif n == 3 and rng.uniform() < 0.25:
        template = f"there is {template}"
    mentions = tuple(describe(scene, scene.objects[i]) for i in order)
    statement = Statement(mentions, tuple(relations), counts)
    return Draft(statement, template, tuple(order), _random_style(rng), _random_style(rng))


def _describe_single(scene: Scene, rng: SceneRng) -> Draft:
    """Describe the only object and, in the full world, its place."""
    (obj,) = scene.objects
    template = rng.choice(("{m0}", "there is {m0}"))
    return Draft(Statement((_with_place(scene, obj, rng),)), template, (0,), _random_style(rng), _random_style(rng))


def _relate_with_places(scene: Scene, rng: SceneRng) -> Draft:
    """Relate two fully described objects and mention the places of some."""
    a, b = rng.permutation(len(scene.objects))[:2]
    mentions = tuple(
        _with_place(scene, scene.objects[i], rng)
        if rng.uniform() < PLACE_PROBABILITY
        else describe(scene, scene.objects[i])
        for i in (a, b)
    )
    relation = Relation(rng.choice(_spatial_relations(scene, a, b)), 0, 1, _random_style(rng))
    template = rng.choice(("{m0} is {r0} {m1}", "{m0} {r0} {m1}"))
    return Draft(Statement(mentions, (relation,)), template, (a, b), _random_style(rng), _random_style(rng))


def _with_place(scene: Scene, obj: SceneObject, rng: SceneRng) -> Description:
    """Describe an object and, in the full world, its place."""
    if scene.difficulty != "full":
        return describe(scene, obj)
    sides = sides_of(obj)
    place = rng.choice(sides) if sides and rng.uniform() < SIDE_PROBABILITY else place_of(obj)
    return replace(describe(scene, obj), place=place)


def _partial(scene: Scene, rng: SceneRng) -> Draft:
    """Relate two objects, each described by some of its attributes."""
    a, b = rng.permutation(len(scene.objects))[:2]
    mentions = tuple(_omit_attributes(describe(scene, scene.objects[i]), rng) for i in (a, b))
    relation = Relation(rng.choice(_spatial_relations(scene, a, b)), 0, 1, _random_style(rng))
    templates = ["{m0} is {r0} {m1}", "there is {m0} {r0} {m1}", "{m0} {r0} {m1}"]
    if RELATION_WORDINGS[relation.kind][relation.wording] in ("to the left of", "to the right of", "above", "below"):
        templates += ["{r0} {m1} is {m0}", "{r0} {m1} we see {m0}"]
    template = rng.choice(templates)
    return Draft(Statement(mentions, (relation,)), template, (a, b), _random_style(rng), _random_style(rng))


def _omit_attributes(description: Description, rng: SceneRng) -> Description:
    """Omit some attributes of `description`; the shape or the colour always stays."""
    keep = rng.uniform()
    return replace(
        description,
        shape="" if keep < 0.12 else description.shape,
        colour="" if keep > 0.85 else description.colour,
        size=description.size if rng.uniform() < 0.6 else "",
        pattern=description.pattern if rng.uniform() < 0.6 else "",
    )


def _counting(scene: Scene, rng: SceneRng) -> Draft:
    """State exact counts: a total with some of its parts, all groups by colour or shape, or the number of two kinds."""
    descriptions = [describe(scene, scene.objects[i]) for i in rng.permutation(len(scene.objects))]
    choice = rng.uniform()
    if choice < 0.4:
        aspects = rng.choice((("colour", "size"), ("colour", "colour"), ("size", "colour")))
        if scene.difficulty == "full":
            aspects = rng.choice((aspects, ("pattern", "colour"), ("size", "pattern")))
        parts = [keep_attributes(description, aspect) for description, aspect in zip(descriptions, aspects)]
        counts = [Count(Description(), len(descriptions)), *_count_objects(scene, parts)]
        template = rng.choice(TOTAL_OPENINGS) + " {c0}, " + " and ".join(f"{{p{k}}}" for k in range(1, len(counts)))
    else:
        groups: tuple[tuple[str, ...], ...] = (("colour",), ("shape",), ("shape", "colour"))
        attributes = rng.choice(groups)
        kinds = [keep_attributes(description, *attributes) for description in descriptions]
        counts = _count_objects(scene, kinds if choice < 0.8 else kinds[:2])
        if choice < 0.8:
            *names, last = [f"{{c{k}}}" for k in range(len(counts))]
            listed = f"{', '.join(names)} and {last}" if names else last
            template = f"{rng.choice(('', 'we see', 'exactly'))} {listed}"
        else:
            template = " and ".join(f"the number of {{g{k}}} is {{n{k}}}" for k in range(len(counts)))
    return Draft(Statement(counts=tuple(counts)), template, (), _random_style(rng), _random_style(rng))


def _count_objects(scene: Scene, kinds: list[Description]) -> list[Count]:
    """Count the objects that match each distinct kind."""
    return [Count(kind, sum(kind.matches(obj) for obj in scene.objects)) for kind in dict.fromkeys(kinds)]


def _random_style(rng: SceneRng) -> int:
    """Draw 0 or 1, the index of a synonym."""
    return int(rng.uniform() * 2)


def _comparing(scene: Scene, rng: SceneRng) -> Draft:
    """Compare two objects in size, colour or shape, and mention a third object if there is one."""
    a, b, *others = rng.permutation(len(scene.objects))
    objs = scene.objects[a], scene.objects[b]
    kind = rng.choice([kind for kind in RELATION_WORDINGS if kind not in OPPOSITE and relation_holds(kind, *objs)])
    compared = {"larger": "size", "smaller": "size"}.get(kind, kind.removeprefix("same "))
    mentions = [replace(describe(scene, objs[0]), **{compared: ""}), describe(scene, objs[1])]
    if compared == "size":
        mentions[1] = replace(mentions[1], size="")
    template = "{m0} is {r0} {m1}"
    if others:
        mentions.append(describe(scene, scene.objects[others[0]]))
        template += ", " + rng.choice(("with", "and there is")) + " {m2}"
    statement = Statement(tuple(mentions), (Relation(kind, 0, 1, _random_style(rng)),))
    return Draft(statement, template, (a, b, *others[:1]), _random_style(rng), _random_style(rng))
