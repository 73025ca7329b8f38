"""Minimal pairs: two training scenes that differ in one property, each with a caption that is false of the other.

Independent scenes rarely share objects, so colours are enough to separate their captions. The hard negatives of ITM and
ITC then never require relations, or the binding of a colour to a shape. Half of the training pairs are therefore
minimal pairs. The two scenes are consecutive samples, in one group of ITM negatives. GRIT-VLP (Byun et al., ECCV 2022)
groups similar images of real data for the same reason.
"""

from collections.abc import Iterable
from dataclasses import replace

from mamo.world import captions, grammar
from mamo.world.scene import Scene, SceneObject, SceneRng, SceneWorld, Split, near_duplicate

MINIMAL_PAIR_SHARE = 0.5
"""Share of the training pairs that are minimal pairs. The others are two independent scenes."""
MIRRORED = {"easy": 0.5, "full": 0.4}
EXCHANGED = {"easy": 0.3, "full": 0.2}
RECOUNTED = {"easy": 0.0, "full": 0.3}
"""Shares of three kinds of minimal pairs. The rest are near duplicates."""

FEWER = 0.3
"""Share of the pairs that differ in a number in which one scene has an object less."""

_STREAM = 23  # random stream of the scene
_EXCHANGEABLE = ("shape", "colour", "pattern")  # not the size, or objects could overlap


def training_scene(
    world: SceneWorld, split: Split, index: int, most_objects: int | None = None
) -> tuple[Scene, Scene | None]:
    """Return training scene `index`, and its counterpart if its pair is a minimal pair, else None.

    Scenes `index` and `index ^ 1` are a pair. Both keep only their first `most_objects` objects (None: all).
    """
    first = _first_objects(world.scene(split, index & ~1), most_objects)
    rng = first.rng(_STREAM)
    if rng.uniform() >= MINIMAL_PAIR_SHARE:
        return (first if index % 2 == 0 else _first_objects(world.scene(split, index), most_objects)), None
    second = counterpart(first, rng)
    return (first, second) if index % 2 == 0 else (second, first)


def counterpart(scene: Scene, rng: SceneRng) -> Scene:
    """Return the other scene of a minimal pair.

    It is mirrored, exchanges an attribute of two objects, differs in a number, or is a near duplicate. Mirroring uses
    an axis that occurs in the relations of the identifying caption, so that this caption becomes false.
    """
    mirrored_to = MIRRORED[scene.difficulty]
    exchanged_to = mirrored_to + EXCHANGED[scene.difficulty]
    kind = rng.uniform()
    if kind < mirrored_to:
        statement = captions.identifying_draft(scene).statement
        mirrored = [
            flipped
            for axis in ("centre_x", "centre_y")
            if not grammar.is_true(statement, flipped := [_mirror(obj, axis) for obj in scene.objects], margin=0.0)
        ]
        if mirrored:
            return replace(scene, objects=tuple(rng.choice(mirrored)))
    if kind < exchanged_to:
        n = len(scene.objects)
        options = [(name, a, b) for name in _EXCHANGEABLE for b in range(n) for a in range(b)]
        unlike = [(name, a, b) for name, a, b in options if _attribute(scene, a, name) != _attribute(scene, b, name)]
        if unlike:
            name, a, b = rng.choice(unlike)
            objects = list(scene.objects)
            for one, other in ((a, b), (b, a)):
                objects[one] = replace(objects[one], **{name: _attribute(scene, other, name)})  # type: ignore[arg-type]
            return replace(scene, objects=tuple(objects))
    elif kind < exchanged_to + RECOUNTED[scene.difficulty]:
        return _recounted(scene, rng) or near_duplicate(scene)
    return near_duplicate(scene)


def _recounted(scene: Scene, rng: SceneRng) -> Scene | None:
    """Return `scene` with one object less, or one that takes an attribute of another; its counting caption is false.

    A near duplicate seldom changes a stated number. Without such pairs less than 1 % of the training captions have a
    hard negative that differs in its numbers only, and ITM hardly learns them.
    """
    objects, n = scene.objects, len(scene.objects)
    fewer = [objects[:k] + objects[k + 1 :] for k in range(n)] if n > 2 else []
    alike = [
        (*objects[:a], replace(objects[a], **{name: _attribute(scene, b, name)}), *objects[a + 1 :])  # type: ignore[arg-type]
        for name in _EXCHANGEABLE
        for a in range(n)
        for b in range(n)
        if _attribute(scene, a, name) != _attribute(scene, b, name)
    ]
    said = captions.caption_draft(scene, captions.COUNTING).statement
    first, second = (fewer, alike) if rng.uniform() < FEWER else (alike, fewer)
    for options in (first, second):
        false = [changed for changed in options if not grammar.is_true(said, changed, margin=0.0)]
        if false:
            return replace(scene, objects=rng.choice(false))
    return None


def distinguishing_draft(scene: Scene, other: Scene, order: Iterable[int]) -> grammar.Draft:
    """Return the draft of the first caption that is false of `other`, in this order; else of the identifying one."""
    drafts = (captions.caption_draft(scene, caption_index) for caption_index in order)
    false = (draft for draft in drafts if not grammar.is_true(draft.statement, other.objects, margin=0.0))
    return next(false, captions.identifying_draft(scene))


def _first_objects(scene: Scene, most_objects: int | None) -> Scene:
    return replace(scene, objects=scene.objects[:most_objects])


def _mirror(obj: SceneObject, axis: str) -> SceneObject:
    return replace(obj, **{axis: 1 - getattr(obj, axis)})


def _attribute(scene: Scene, index: int, name: str) -> str:
    value: str = getattr(scene.objects[index], name)
    return value
