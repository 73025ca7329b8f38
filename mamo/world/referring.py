"""Referring expressions of the embedded world: a phrase that matches one object of a scene, its box, and proposals.

An expression mentions as few attributes as distinguish its object, in random order of preference. If all attributes
match two objects, it adds a relation to another object. The foil differs in one attribute and matches no object.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mamo.data.records import Box
from mamo.world.grammar import (
    Description,
    Draft,
    Relation,
    Statement,
    describe,
    is_true,
    keep_attributes,
    relation_holds,
    write,
)
from mamo.world.scene import Scene, SceneObject, SceneRng, SceneWorld, Split, attribute_values

_STREAM, _FOIL_STREAM = 19, 22  # random streams of the scene
_DISTRACTORS_PER_OBJECT = 2
ATTRIBUTES = ("shape", "colour", "size", "pattern")
_SPATIAL = ("left", "right", "above", "below")


@dataclass(frozen=True, slots=True)
class Expression:
    """A phrase that matches only object `target` of scene `scene_index`. `foil` has the same wording and matches none.

    `box` is the object's. Boxes are (x, y, width, height) in pixels.
    """

    scene_index: int
    text: str
    foil: str
    target: int
    box: Box
    proposals: tuple[Box, ...]


def expressions(
    world: SceneWorld, n_items: int, image_size_px: tuple[int, int], split: Split = "test"
) -> Iterator[Expression]:
    """Yield the first `n_items` expressions of a split, at most one a scene; a pure function.

    Scenes without a distinguishable target are skipped. The proposals are the boxes of all objects and twice as many
    distractors (moved and resized), in random order.
    """
    index = found = 0
    while found < n_items:
        scene = world.scene(split, index)
        rng = scene.rng(_STREAM)
        target = int(rng.uniform() * len(scene.objects))
        draft = _draft(scene, target, rng)
        if draft is not None:
            boxes = [obj.box_px(image_size_px) for obj in scene.objects]
            others = [_distractor_box(box, image_size_px, rng) for box in boxes for _ in range(_DISTRACTORS_PER_OBJECT)]
            proposals = [*boxes, *others]
            order = rng.permutation(len(proposals))
            text, foil = (_write(each, scene) for each in (draft, _foil(draft, scene)))
            yield Expression(index, text, foil, target, boxes[target], tuple(proposals[k] for k in order))
            found += 1
        index += 1


def _draft(scene: Scene, target: int, rng: SceneRng) -> Draft | None:
    """Write a phrase that matches only the target; None if attributes and relations do not distinguish it."""
    objs = scene.objects
    distinguishing = distinguishing_description(scene, target, list(ATTRIBUTES), rng)
    if distinguishing is not None:
        return _make_draft(Statement((distinguishing,)), "{m0}", (target,), rng)
    description = describe(scene, objs[target])
    for k in rng.permutation(len(objs)):
        if k == target or description.matches(objs[k]):
            continue
        other = describe(scene, objs[k])
        if sum(other.matches(obj) for obj in objs) > 1:
            continue
        for kind in (_SPATIAL[i] for i in rng.permutation(len(_SPATIAL))):
            # no other object may be in this relation, by any distance
            near = [relation_holds(kind, obj, objs[k], margin=0.0) for obj in objs]
            fitting = [i for i, obj in enumerate(objs) if description.matches(obj) and near[i]]
            if fitting == [target] and relation_holds(kind, objs[target], objs[k]):
                statement = Statement((description, other), (Relation(kind, 0, 1),))
                assert is_true(statement, objs)
                return _make_draft(statement, "{m0} {r0} {m1}", (target, k), rng)
    return None


def distinguishing_description(scene: Scene, target: int, names: list[str], rng: SceneRng) -> Description | None:
    """Add attributes of `names` in random order until only object `target` matches; None if all do not suffice."""
    description = Description()
    for k in rng.permutation(len(names)):
        if names[k] == "pattern" and scene.difficulty != "full":
            continue  # in `easy` all are solid
        description = replace(description, **{names[k]: getattr(scene.objects[target], names[k])})
        if sum(description.matches(obj) for obj in scene.objects) == 1:
            return description
    return None


def partial_description(scene: Scene, obj: SceneObject, names: Sequence[str], rng: SceneRng) -> Description:
    """Describe an object by one or two random attributes out of `names`."""
    description = describe(scene, obj)
    known = [name for name in names if getattr(description, name)]
    return keep_attributes(description, *(known[k] for k in rng.permutation(len(known))[: 1 + int(rng.uniform() * 2)]))


def _foil(draft: Draft, scene: Scene) -> Draft:
    """Change (or else add) one attribute of the draft's target so that nothing in the scene matches."""
    rng, (description, *others) = scene.rng(_FOIL_STREAM), draft.statement.mentions
    shuffled = [ATTRIBUTES[k] for k in rng.permutation(len(ATTRIBUTES))]
    names = [name for name in shuffled if name != "pattern" or description.pattern]
    for name in sorted(names, key=lambda name: not getattr(description, name)):
        values = attribute_values(name, scene.difficulty)
        for k in rng.permutation(len(values)):
            false = replace(draft.statement, mentions=(replace(description, **{name: values[k]}), *others))
            if not is_true(false, scene.objects, margin=0.0):
                return replace(draft, statement=false)
    raise AssertionError("five objects cannot have all combinations of attributes")


def _make_draft(statement: Statement, template: str, referents: tuple[int, ...], rng: SceneRng) -> Draft:
    """Build a draft with random synonyms."""
    style = int(rng.uniform() * 2)
    return Draft(statement, template, referents, style, style)


def _write(draft: Draft, scene: Scene) -> str:
    return write(draft, scene.objects).text


def _distractor_box(box: Box, image_size_px: tuple[int, int], rng: SceneRng) -> Box:
    """Scale a box by 0.7 to 1.4 and move it by 0.4 to 1.2 of its sides on each axis, within the image."""
    height, width = image_size_px
    x, y, w, h = box
    scale = rng.uniform(0.7, 1.4)
    w, h = min(w * scale, width), min(h * scale, height)
    dx, dy = (rng.choice((-1, 1)) * rng.uniform(0.4, 1.2) for _ in range(2))
    return min(max(x + dx * w, 0.0), width - w), min(max(y + dy * h, 0.0), height - h), w, h
