"""Training scenes in pairs that differ in one thing, each with a caption that is false of the other.

Scenes drawn alone hardly ever share their objects, so one glance at the colours tells their captions apart, and the
hard negatives of ITM and ITC never ask who is left of whom or which of two shapes is the red one. Half of the training
pairs are therefore twins. They stand side by side in the order of samples, inside one pool of ITM negatives; grouping
like images so that hard negatives are hard is what GRIT-VLP (Byun et al., ECCV 2022) does with real data.
"""

from collections.abc import Iterable
from dataclasses import replace

from mamo.world import captions, grammar
from mamo.world.scene import Scene, SceneObject, SceneRng, SceneWorld, Split, near_duplicate

TWIN_SHARE = 0.5
"""Share of the pairs that are twins; the others are two scenes that have nothing in common."""
MIRRORED, EXCHANGED = 0.5, 0.3
"""Shares of the kinds of twins; the rest are near duplicates."""

_STREAM = 23  # of the scene's randomness; lower ones are taken
_EXCHANGEABLE = ("shape", "colour", "pattern")  # not the size: objects could come to overlap


def training_scene(
    world: SceneWorld, split: Split, index: int, most_objects: int | None = None
) -> tuple[Scene, Scene | None]:
    """Scene `index` of the training pairs, and its twin where it has one; `index ^ 1` is the other of the pair.

    Of either, the first `most_objects` objects alone are shown.
    """
    first = _fewer(world.scene(split, index & ~1), most_objects)
    draws = first.draws(_STREAM)
    if draws.uniform() >= TWIN_SHARE:
        return (first if index % 2 == 0 else _fewer(world.scene(split, index), most_objects)), None
    second = twin(first, draws)
    return (first, second) if index % 2 == 0 else (second, first)


def twin(scene: Scene, draws: SceneRng) -> Scene:
    """`scene` mirrored, or with two objects' attribute exchanged, or as a near duplicate: as likely a scene as it is.

    It is mirrored along an axis along which its identifying caption relates objects, so that this caption turns false.
    """
    kind = draws.uniform()
    if kind < MIRRORED:
        said = captions.identifying_draft(scene).statement
        mirrored = [
            flipped
            for axis in ("centre_x", "centre_y")
            if not grammar.is_true(said, flipped := [_mirror(thing, axis) for thing in scene.objects], margin=0.0)
        ]
        if mirrored:
            return replace(scene, objects=tuple(draws.pick(mirrored)))
    if kind < MIRRORED + EXCHANGED:
        n = len(scene.objects)
        options = [(name, a, b) for name in _EXCHANGEABLE for b in range(n) for a in range(b)]
        unlike = [(name, a, b) for name, a, b in options if _of(scene, a, name) != _of(scene, b, name)]
        if unlike:
            name, a, b = draws.pick(unlike)
            objects = list(scene.objects)
            for one, other in ((a, b), (b, a)):
                objects[one] = replace(objects[one], **{name: _of(scene, other, name)})  # type: ignore[arg-type]
            return replace(scene, objects=tuple(objects))
    return near_duplicate(scene)


def distinguishing_caption(scene: Scene, other: Scene, order: Iterable[int]) -> str:
    """The first of the scene's captions, in this order, that is false of `other`; else the identifying one."""
    drafts = (captions.caption_draft(scene, which) for which in order)
    false = (draft for draft in drafts if not grammar.is_true(draft.statement, other.objects, margin=0.0))
    return grammar.write(next(false, captions.identifying_draft(scene)), scene.objects).text


def _fewer(scene: Scene, most_objects: int | None) -> Scene:
    return replace(scene, objects=scene.objects[:most_objects])


def _mirror(thing: SceneObject, axis: str) -> SceneObject:
    return replace(thing, **{axis: 1 - getattr(thing, axis)})


def _of(scene: Scene, index: int, name: str) -> str:
    value: str = getattr(scene.objects[index], name)
    return value
