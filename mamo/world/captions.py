"""The captions of a scene: five that vary, and one that identifies it, each a pure function of the scene."""

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
    only,
    place_of,
    relation_holds,
    sides_of,
    write,
)
from mamo.world.scene import Scene, SceneObject, SceneRng

N_CAPTIONS = 5
PLACING = 1  # the caption of the full world that says where objects are
PLACE_PROBABILITY = 0.75  # that it says so of each of its two objects
SIDE_PROBABILITY = 0.5  # that a place is a side of the centre ("left of the centre"), where it is off the centre
TOTAL_OPENINGS = ("", "there are", "exactly")

_FIRST_CAPTION_STREAM = 2  # streams 0 and 1 of a scene are its objects and its pixel noise
_IDENTIFYING_STREAM = _FIRST_CAPTION_STREAM + N_CAPTIONS


def captions(scene: Scene) -> tuple[Caption, ...]:
    """The scene's five captions: see `caption`."""
    return tuple(caption(scene, which) for which in range(N_CAPTIONS))


def caption(scene: Scene, which: int) -> Caption:
    """Caption `which` of `scene`: 0 and 1 describe all, 2 relates two objects, 3 counts, 4 compares two.

    In the full world caption 1 relates two objects and says where some of them are: by a cell, or by a side of the
    centre in the words of relations. "[MASK] of the centre" is learned by looking up one object, and what was learned
    so helps with "[MASK] of" another object, which takes two. Of a scene with one object (`twins.training_scene` makes
    them) each caption says what and where it is. A pure function of the scene. Raises ValueError where `which` is not
    in 0 to 4.
    """
    return write(caption_draft(scene, which), scene.objects)


def identifying_caption(scene: Scene) -> Caption:
    """The retrieval caption: all objects with all attributes and some relations, true of hardly any other scene.

    It is worded like captions 0 and 1. For two objects it says that there are two: other scenes may hold such a pair.
    """
    return write(identifying_draft(scene), scene.objects)


def identifying_draft(scene: Scene) -> Draft:
    """The draft of `identifying_caption`."""
    if len(scene.objects) == 1:
        return _alone(scene, scene.draws(_IDENTIFYING_STREAM))
    return _full(scene, scene.draws(_IDENTIFYING_STREAM), total_probability=0.0)


def caption_draft(scene: Scene, which: int) -> Draft:
    """The draft of caption `which`, from which the probes make foils."""
    if not 0 <= which < N_CAPTIONS:
        raise ValueError(f"scenes: caption {which} does not exist; a scene has captions 0 to {N_CAPTIONS - 1}")
    draws = scene.draws(_FIRST_CAPTION_STREAM + which)
    if len(scene.objects) == 1:
        return _alone(scene, draws)
    if which == PLACING and scene.difficulty == "full":
        return _placing(scene, draws)
    if which < 2:
        return _full(scene, draws, total_probability=0.25)
    makers: tuple[Callable[[Scene, SceneRng], Draft], ...] = (_partial, _counting, _comparing)
    return makers[which - 2](scene, draws)


def _axes(scene: Scene, a: int, b: int) -> list[str]:
    """The spatial relations from object `a` to `b` that hold, the clearest first; at least one does."""
    first, second = scene.objects[a], scene.objects[b]
    dx, dy = first.centre_x - second.centre_x, first.centre_y - second.centre_y
    kinds = ["left" if dx < 0 else "right", "above" if dy < 0 else "below"]
    if abs(dy) > abs(dx):
        kinds.reverse()
    return [kind for kind in kinds if relation_holds(kind, first, second)]


def _full(scene: Scene, draws: SceneRng, total_probability: float) -> Draft:
    order = draws.shuffled(len(scene.objects))
    wordings = [_style(draws) for _ in range(3)]
    relations: list[Relation] = []

    def relate(a: int, b: int, limit: int = 1) -> list[str]:
        found = _axes(scene, order[a], order[b])[:limit]
        start = len(relations)
        relations.extend(Relation(kind, a, b, wordings[start + k]) for k, kind in enumerate(found))
        return [f"{{r{start + k}}}" for k in range(len(found))]

    n = len(order)
    if n == 2:
        template = f"{{m0}} {' and '.join(relate(0, 1, limit=2))} {{m1}}"
    elif n == 4:
        link = draws.pick(("", " is"))
        template = f"{{m0}}{link} {relate(0, 1)[0]} {{m1}}, and {{m2}}{link} {relate(2, 3)[0]} {{m3}}"
    else:  # "a ... left of b ... and above c ..." relates a to both
        template = f"{{m0}} {relate(0, 1)[0]} {{m1}} and {relate(0, 2)[0]} {{m2}}"
        if n == 5:
            template += f", and {{m3}} {relate(3, 4)[0]} {{m4}}"
    counts: tuple[Count, ...] = ()
    if n == 2 or (n < 5 and draws.uniform() < total_probability):
        counts = (Count(Description(), n),)
        opening = draws.pick(TOTAL_OPENINGS) if n == 2 else ""  # more objects leave no room for more words
        template = f"{opening} {{c0}}: {template}"
    elif n == 3 and draws.uniform() < 0.25:
        template = f"there is {template}"
    mentions = tuple(describe(scene, scene.objects[i]) for i in order)
    statement = Statement(mentions, tuple(relations), counts)
    return Draft(statement, template, tuple(order), _style(draws), _style(draws))


def _alone(scene: Scene, draws: SceneRng) -> Draft:
    """What the only object is and, in the full world, where."""
    (thing,) = scene.objects
    template = draws.pick(("{m0}", "there is {m0}"))
    return Draft(Statement((_with_place(scene, thing, draws),)), template, (0,), _style(draws), _style(draws))


def _placing(scene: Scene, draws: SceneRng) -> Draft:
    """Two objects, whole, in a relation, and where some of them are."""
    a, b = draws.shuffled(len(scene.objects))[:2]
    mentions = tuple(
        _with_place(scene, scene.objects[i], draws)
        if draws.uniform() < PLACE_PROBABILITY
        else describe(scene, scene.objects[i])
        for i in (a, b)
    )
    relation = Relation(draws.pick(_axes(scene, a, b)), 0, 1, _style(draws))
    template = draws.pick(("{m0} is {r0} {m1}", "{m0} {r0} {m1}"))
    return Draft(Statement(mentions, (relation,)), template, (a, b), _style(draws), _style(draws))


def _with_place(scene: Scene, thing: SceneObject, draws: SceneRng) -> Description:
    if scene.difficulty != "full":
        return describe(scene, thing)
    sides = sides_of(thing)
    place = draws.pick(sides) if sides and draws.uniform() < SIDE_PROBABILITY else place_of(thing)
    return replace(describe(scene, thing), place=place)


def _partial(scene: Scene, draws: SceneRng) -> Draft:
    a, b = draws.shuffled(len(scene.objects))[:2]
    mentions = tuple(_some(describe(scene, scene.objects[i]), draws) for i in (a, b))
    relation = Relation(draws.pick(_axes(scene, a, b)), 0, 1, _style(draws))
    templates = ["{m0} is {r0} {m1}", "there is {m0} {r0} {m1}", "{m0} {r0} {m1}"]
    if RELATION_WORDINGS[relation.kind][relation.wording] in ("to the left of", "to the right of", "above", "below"):
        templates += ["{r0} {m1} is {m0}", "{r0} {m1} we see {m0}"]
    return Draft(Statement(mentions, (relation,)), draws.pick(templates), (a, b), _style(draws), _style(draws))


def _some(what: Description, draws: SceneRng) -> Description:
    """`what` with some attributes unsaid, but always the shape or the colour."""
    keep = draws.uniform()
    return replace(
        what,
        shape="" if keep < 0.12 else what.shape,
        colour="" if keep > 0.85 else what.colour,
        size=what.size if draws.uniform() < 0.6 else "",
        pattern=what.pattern if draws.uniform() < 0.6 else "",
    )


def _counting(scene: Scene, draws: SceneRng) -> Draft:
    """Exact counts: a total with some parts of it, all groups by colour or shape, or the number of some kinds."""
    things = [describe(scene, scene.objects[i]) for i in draws.shuffled(len(scene.objects))]
    choice = draws.uniform()
    if choice < 0.4:
        aspects = draws.pick((("colour", "size"), ("colour", "colour"), ("size", "colour")))
        if scene.difficulty == "full":
            aspects = draws.pick((aspects, ("pattern", "colour"), ("size", "pattern")))
        parts = [only(thing, aspect) for thing, aspect in zip(things, aspects, strict=False)]
        counts = [Count(Description(), len(things)), *_exact(scene, parts)]
        template = draws.pick(TOTAL_OPENINGS) + " {c0}, " + " and ".join(f"{{p{k}}}" for k in range(1, len(counts)))
    else:
        groups: tuple[tuple[str, ...], ...] = (("colour",), ("shape",), ("shape", "colour"))
        said = draws.pick(groups)
        kinds = [only(thing, *said) for thing in things]
        counts = _exact(scene, kinds if choice < 0.8 else kinds[:2])
        if choice < 0.8:
            *names, last = [f"{{c{k}}}" for k in range(len(counts))]
            listed = f"{', '.join(names)} and {last}" if names else last
            template = f"{draws.pick(('', 'we see', 'exactly'))} {listed}"
        else:
            template = " and ".join(f"the number of {{g{k}}} is {{n{k}}}" for k in range(len(counts)))
    return Draft(Statement(counts=tuple(counts)), template, (), _style(draws), _style(draws))


def _exact(scene: Scene, kinds: list[Description]) -> list[Count]:
    return [Count(kind, sum(kind.fits(thing) for thing in scene.objects)) for kind in dict.fromkeys(kinds)]


def _style(draws: SceneRng) -> int:
    return int(draws.uniform() * 2)


def _comparing(scene: Scene, draws: SceneRng) -> Draft:
    """How two objects compare in size, colour or shape, and one more object where there is one."""
    a, b, *others = draws.shuffled(len(scene.objects))
    things = scene.objects[a], scene.objects[b]
    kind = draws.pick([kind for kind in RELATION_WORDINGS if kind not in OPPOSITE and relation_holds(kind, *things)])
    unsaid = {"larger": "size", "smaller": "size"}.get(kind, kind.removeprefix("same "))
    mentions = [replace(describe(scene, things[0]), **{unsaid: ""}), describe(scene, things[1])]
    if unsaid == "size":
        mentions[1] = replace(mentions[1], size="")
    template = "{m0} is {r0} {m1}"
    if others:
        mentions.append(describe(scene, scene.objects[others[0]]))
        template += ", " + draws.pick(("with", "and there is")) + " {m2}"
    statement = Statement(tuple(mentions), (Relation(kind, 0, 1, _style(draws)),))
    return Draft(statement, template, (a, b, *others[:1]), _style(draws), _style(draws))
