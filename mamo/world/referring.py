"""Referring expressions of the embedded world: a phrase that fits one object of a picture, its box, and proposals.

An expression names as few attributes as tell its object from the others, in random order of preference; where all of
them do not ("two red circles"), it adds where the object is from another one. Its foil differs in one attribute and
is true of nothing in the picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mamo.world.grammar import Description, Draft, Relation, Statement, describe, is_true, only, relation_holds, write
from mamo.world.scene import COLOURS, PATTERNS, SHAPES, SIZES, Scene, SceneObject, SceneRng, SceneWorld, Split

Box = tuple[float, float, float, float]
_STREAM, _FOIL_STREAM = 19, 22  # of the scene's randomness
_DISTRACTORS_PER_OBJECT = 2
ATTRIBUTES = ("shape", "colour", "size", "pattern")
_SPATIAL = ("left", "right", "above", "below")


@dataclass(frozen=True, slots=True)
class Expression:
    """`text` fits object `target` of the scene at `scene_index` alone, `foil` (worded alike) fits none of its objects;
    boxes are (x, y, width, height) in pixels.
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
    """`n_items` expressions, one a scene, from the lowest indices of `split` that allow one; a pure function.

    The proposals are the boxes of all objects and twice as many others, moved and resized, in random order.
    """
    index = found = 0
    while found < n_items:
        scene = world.scene(split, index)
        draws = scene.draws(_STREAM)
        target = int(draws.uniform() * len(scene.objects))
        draft = _draft(scene, target, draws)
        if draft is not None:
            boxes = [thing.box_px(image_size_px) for thing in scene.objects]
            others = [_moved(box, image_size_px, draws) for box in boxes for _ in range(_DISTRACTORS_PER_OBJECT)]
            proposals = [*boxes, *others]
            order = draws.shuffled(len(proposals))
            text, foil = (_write(each, scene) for each in (draft, _foil(draft, scene)))
            yield Expression(index, text, foil, target, boxes[target], tuple(proposals[k] for k in order))
            found += 1
        index += 1


def _draft(scene: Scene, target: int, draws: SceneRng) -> Draft | None:
    """A phrase that fits the target alone; None where no attribute and no relation tells it apart."""
    things, wanted = scene.objects, scene.objects[target]
    alone = distinguishing_description(scene, target, list(ATTRIBUTES), draws)
    if alone is not None:
        return _styled(Statement((alone,)), "{m0}", (target,), draws)
    said = describe(scene, wanted)
    for k in draws.shuffled(len(things)):
        if k == target or said.fits(things[k]):
            continue
        other = describe(scene, things[k])
        if sum(other.fits(thing) for thing in things) > 1:
            continue
        for kind in (_SPATIAL[i] for i in draws.shuffled(len(_SPATIAL))):
            # what may be read as true by the slightest distance is no way to tell apart
            near = [relation_holds(kind, thing, things[k], margin=0.0) for thing in things]
            fitting = [i for i, thing in enumerate(things) if said.fits(thing) and near[i]]
            if fitting == [target] and relation_holds(kind, wanted, things[k]):
                statement = Statement((said, other), (Relation(kind, 0, 1),))
                assert is_true(statement, things)
                return _styled(statement, "{m0} {r0} {m1}", (target, k), draws)
    return None


def distinguishing_description(scene: Scene, target: int, names: list[str], draws: SceneRng) -> Description | None:
    """As few of the attributes `names` as fit object `target` alone, in random order; None where all do not."""
    said = Description()
    for k in draws.shuffled(len(names)):
        if names[k] == "pattern" and scene.difficulty != "full":
            continue  # all are solid there: not worth saying
        said = replace(said, **{names[k]: getattr(scene.objects[target], names[k])})
        if sum(said.fits(thing) for thing in scene.objects) == 1:
            return said
    return None


def one_or_two(scene: Scene, thing: SceneObject, names: Sequence[str], draws: SceneRng) -> Description:
    """One or two of an object's attributes `names`, where they are worth saying."""
    what = describe(scene, thing)
    worth = [name for name in names if getattr(what, name)]
    return only(what, *(worth[k] for k in draws.shuffled(len(worth))[: 1 + int(draws.uniform() * 2)]))


def _foil(draft: Draft, scene: Scene) -> Draft:
    """The draft with another value of one attribute of its object (said, else added): true of nothing in the scene."""
    draws, (said, *others) = scene.draws(_FOIL_STREAM), draft.statement.mentions
    names = [ATTRIBUTES[k] for k in draws.shuffled(len(ATTRIBUTES)) if ATTRIBUTES[k] != "pattern" or said.pattern]
    for name in sorted(names, key=lambda name: not getattr(said, name)):
        values = values_of(name, scene)
        for k in draws.shuffled(len(values)):
            false = replace(draft.statement, mentions=(replace(said, **{name: values[k]}), *others))
            if not is_true(false, scene.objects, margin=0.0):
                return replace(draft, statement=false)
    raise AssertionError("a few objects cannot have every look")


def values_of(attribute: str, scene: Scene) -> tuple[str, ...]:
    """The values that an attribute can have in a scene's world."""
    values = {
        "colour": tuple(COLOURS),
        "shape": SHAPES[scene.difficulty],
        "size": tuple(SIZES[scene.difficulty]),
        "pattern": PATTERNS[scene.difficulty],
    }
    return values[attribute]


def _styled(statement: Statement, template: str, referents: tuple[int, ...], draws: SceneRng) -> Draft:
    style = int(draws.uniform() * 2)
    return Draft(statement, template, referents, style, style)


def _write(draft: Draft, scene: Scene) -> str:
    return write(draft, scene.objects).text


def _moved(box: Box, image_size_px: tuple[int, int], draws: SceneRng) -> Box:
    """Another box of 0.7 to 1.4 times the sides, moved by 0.4 to 1.2 of its own on each axis, within the image."""
    height, width = image_size_px
    x, y, w, h = box
    scale = draws.uniform(0.7, 1.4)
    w, h = min(w * scale, width), min(h * scale, height)
    dx, dy = (draws.pick((-1, 1)) * draws.uniform(0.4, 1.2) for _ in range(2))
    return min(max(x + dx * w, 0.0), width - w), min(max(y + dy * h, 0.0), height - h), w, h
