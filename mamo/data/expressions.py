"""Referring expressions of the embedded world: a phrase that fits one object of a picture, its box, and proposals.

An expression names as few attributes as tell its object from the others, in random order of preference; where all of
them do not ("two red circles"), it adds where the object is from another one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mamo.data.grammar import Description, Draft, Relation, Statement, describe, holds, only, relation_holds, write
from mamo.data.scenes import Draws, Scene, SceneObject, SceneWorld, Split

Box = tuple[float, float, float, float]
_STREAM = 19  # of the scene's randomness; everything else uses lower ones
_DISTRACTORS_PER_OBJECT = 2
ATTRIBUTES = ("shape", "colour", "size", "pattern")
_SPATIAL = ("left", "right", "above", "below")


@dataclass(frozen=True, slots=True)
class Expression:
    """`text` fits object `target` of the scene at `scene_index` alone; boxes are (x, y, width, height) in pixels."""

    scene_index: int
    text: str
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
        text = _text(scene, target, draws)
        if text is not None:
            boxes = [thing.box_px(image_size_px) for thing in scene.objects]
            others = [_moved(box, image_size_px, draws) for box in boxes for _ in range(_DISTRACTORS_PER_OBJECT)]
            proposals = [*boxes, *others]
            order = draws.shuffled(len(proposals))
            yield Expression(index, text, target, boxes[target], tuple(proposals[k] for k in order))
            found += 1
        index += 1


def _text(scene: Scene, target: int, draws: Draws) -> str | None:
    """A phrase that fits the target alone; None where no attribute and no relation tells it apart."""
    things, wanted = scene.objects, scene.objects[target]
    alone = tells_apart(scene, target, list(ATTRIBUTES), draws)
    if alone is not None:
        return _write(Statement((alone,)), "{m0}", (target,), scene, draws)
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
                assert holds(statement, things)
                return _write(statement, "{m0} {r0} {m1}", (target, k), scene, draws)
    return None


def tells_apart(scene: Scene, target: int, names: list[str], draws: Draws) -> Description | None:
    """As few of the attributes `names` as fit object `target` alone, in random order; None where all do not."""
    said = Description()
    for k in draws.shuffled(len(names)):
        if names[k] == "pattern" and scene.difficulty != "full":
            continue  # all are solid there: not worth saying
        said = replace(said, **{names[k]: getattr(scene.objects[target], names[k])})
        if sum(said.fits(thing) for thing in scene.objects) == 1:
            return said
    return None


def one_or_two(scene: Scene, thing: SceneObject, names: Sequence[str], draws: Draws) -> Description:
    """One or two of an object's attributes `names`, where they are worth saying."""
    what = describe(scene, thing)
    worth = [name for name in names if getattr(what, name)]
    return only(what, *(worth[k] for k in draws.shuffled(len(worth))[: 1 + int(draws.uniform() * 2)]))


def _write(statement: Statement, template: str, referents: tuple[int, ...], scene: Scene, draws: Draws) -> str:
    style = int(draws.uniform() * 2)
    return write(Draft(statement, template, referents, style, style), scene.objects).text


def _moved(box: Box, image_size_px: tuple[int, int], draws: Draws) -> Box:
    """Another box of 0.7 to 1.4 times the sides, moved by 0.4 to 1.2 of its own on each axis, within the image."""
    height, width = image_size_px
    x, y, w, h = box
    scale = draws.uniform(0.7, 1.4)
    w, h = min(w * scale, width), min(h * scale, height)
    dx, dy = (draws.pick((-1, 1)) * draws.uniform(0.4, 1.2) for _ in range(2))
    return min(max(x + dx * w, 0.0), width - w), min(max(y + dy * h, 0.0), height - h), w, h
