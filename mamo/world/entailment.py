"""Visual entailment in the embedded world: statements about scenes of which a card covers one cell of the grid.

A statement is true (`entailment`), false (`contradiction`) or undecided (`neutral`): an object under the card could
make it true or false. Each statement occurs three times, once with each label, so the text does not reveal the label.

| kind | wording |
|---|---|
| cell | "there is a red circle in the north" |
| side | "there is a red circle left of the centre" |
| relation | "a red circle is above a small square" |

The card may cover an object or, where the scene could have one more, an empty cell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mamo.data.records import ENTAILMENT_LABELS, EntailmentLabel
from mamo.world.grammar import (
    OPPOSITE,
    RELATION_WORDINGS,
    Description,
    Relation,
    Statement,
    is_true,
    noun_phrase,
    place_of,
    relation_holds,
    sides_of,
)
from mamo.world.referring import ATTRIBUTES, partial_description
from mamo.world.rendering import render
from mamo.world.scene import (
    CELL_JITTER,
    CELLS,
    N_OBJECTS,
    Scene,
    SceneObject,
    SceneRng,
    SceneWorld,
    Split,
    attribute_values,
)

KINDS = ("cell", "side", "cell", "relation")
"""In turn: half of the statements are of kind `cell`."""
CARD_GREY = 128
_STREAM = 24  # random stream of a set's first scene
_SCENES_PER_SET = 6
_TRIES = 300
_Claim = tuple[Statement, str]
"""Meaning and sentence."""
_PlacesOf = Callable[[SceneObject], list[str]]


@dataclass(frozen=True, slots=True)
class EntailmentItem:
    """A sentence about scene `scene_index`, whose cell `covered` (row by row from 0) is hidden, and its label."""

    scene_index: int
    covered: int
    sentence: str
    label: EntailmentLabel
    identifier: str


def entailment_items(world: SceneWorld, split: Split, n_items: int) -> Iterator[EntailmentItem]:
    """Yield the first `n_items` items of `split`, three of each sentence, one a label; a pure function.

    Set s uses three of the scenes 6 s to 6 s + 5, in random order.
    """
    for number in range((n_items + 2) // 3):
        scenes = [world.scene(split, _SCENES_PER_SET * number + k) for k in range(_SCENES_PER_SET)]
        rng = scenes[0].rng(_STREAM)
        (_, sentence), chosen = _claim_of_three(scenes, KINDS[number % len(KINDS)], rng)
        order = rng.permutation(len(ENTAILMENT_LABELS))
        for position in range(min(len(ENTAILMENT_LABELS), n_items - len(ENTAILMENT_LABELS) * number)):
            label = ENTAILMENT_LABELS[order[position]]
            scene, covered = chosen[label]
            yield EntailmentItem(scene.index, covered, sentence, label, f"{split}-{number}-{position}")


def render_covered(scene: Scene, covered: int, image_size_px: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Render `scene` as uint8 [H, W, 3] with a grey card over cell `covered`; arguments and errors as of `render`."""
    picture = render(scene, image_size_px)
    rows, columns = (
        slice(round(side * cell / CELLS), round(side * (cell + 1) / CELLS))
        for side, cell in zip(image_size_px, divmod(covered, CELLS), strict=True)
    )
    picture[rows, columns] = CARD_GREY
    return picture


def cell_of(obj: SceneObject) -> int:
    """Return the cell of an object's centre, numbered row by row."""
    return int(obj.centre_y * CELLS) * CELLS + int(obj.centre_x * CELLS)


def coverable_cells(scene: Scene) -> list[int]:
    """Return the cells that a card may cover: those under which an object can be."""
    taken = {cell_of(obj) for obj in scene.objects}
    is_full = len(scene.objects) == max(N_OBJECTS[scene.difficulty])
    return [cell for cell in range(CELLS * CELLS) if cell in taken or not is_full]


def _label(statement: Statement, scene: Scene, covered: int) -> EntailmentLabel | None:
    """Return the label of a statement about a scene with a card; None where the margin of a relation decides it.

    A further object can only make such a statement true, so it is entailed by what is visible or not at all.
    """
    visible = tuple(obj for obj in scene.objects if cell_of(obj) != covered)
    hidden = [obj for mention in statement.mentions for obj in _hidden(mention, scene, covered)]
    if is_true(statement, visible):
        return "entailment"
    if is_true(statement, visible, margin=0.0):
        return None
    if not any(is_true(statement, (*visible, obj), margin=0.0) for obj in hidden):
        return "contradiction"
    return "neutral" if any(is_true(statement, (*visible, obj)) for obj in hidden) else None


def _hidden(description: Description, scene: Scene, covered: int) -> Iterator[SceneObject]:
    """Yield an object with the described attributes at two opposite ends of the places in the covered cell."""
    row, column = divmod(covered, CELLS)
    filled = {name: getattr(description, name) or attribute_values(name, scene.difficulty)[0] for name in ATTRIBUTES}
    for jitter in (-CELL_JITTER, CELL_JITTER):
        x, y = ((cell + 0.5) / CELLS + jitter for cell in (column, row))
        yield SceneObject(**filled, centre_x=x, centre_y=y, radius=0.1, angle=0.0)


def _claim_of_three(
    scenes: list[Scene], kind: str, rng: SceneRng
) -> tuple[_Claim, dict[EntailmentLabel, tuple[Scene, int]]]:
    """Draw a claim, and for each label a scene with a covered cell; of the next kind if `kind` yields none."""
    for turn in range(len(KINDS)):
        maker = _MAKERS[KINDS[(KINDS.index(kind) + turn) % len(KINDS)]]
        for _ in range(_TRIES):
            covered = [rng.choice(coverable_cells(scene)) for scene in scenes]
            source = int(rng.uniform() * len(scenes))
            visible = [obj for obj in scenes[source].objects if cell_of(obj) != covered[source]]
            claim = maker(scenes[source], visible, rng)
            if claim is None:
                continue
            labels = [_label(claim[0], *both) for both in zip(scenes, covered, strict=True)]
            row = {labels[k]: k for k in rng.permutation(len(scenes))}  # a random one of each label
            if row.keys() >= set(ENTAILMENT_LABELS):
                return claim, {name: (scenes[row[name]], covered[row[name]]) for name in ENTAILMENT_LABELS}
    raise AssertionError("no claim has all three labels")


def _in_cell(scene: Scene, visible: list[SceneObject], rng: SceneRng) -> _Claim | None:
    """Claim an object in a cell."""
    return _existence(scene, visible, rng, lambda obj: [place_of(obj)])


def _at_side(scene: Scene, visible: list[SceneObject], rng: SceneRng) -> _Claim | None:
    """Claim an object at a side of the centre."""
    return _existence(scene, visible, rng, sides_of)


def _existence(scene: Scene, visible: list[SceneObject], rng: SceneRng, places_of: _PlacesOf) -> _Claim | None:
    obj = rng.choice(visible)
    places = places_of(obj)
    if not places:
        return None
    description = replace(partial_description(scene, obj, ATTRIBUTES, rng), place=rng.choice(places))
    sentence = f"there is a {noun_phrase(description, False, _style(rng), _style(rng))}"
    return Statement((description,)), sentence


def _relation(scene: Scene, visible: list[SceneObject], rng: SceneRng) -> _Claim | None:
    """Claim a spatial relation between two objects."""
    if len(visible) < 2:
        return None
    a, b = (visible[k] for k in rng.permutation(len(visible))[:2])
    kind = rng.choice([kind for kind in OPPOSITE if relation_holds(kind, a, b)])
    first, other = (partial_description(scene, obj, ATTRIBUTES, rng) for obj in (a, b))
    style, wording = _style(rng), _style(rng)
    phrases = [noun_phrase(each, False, style, style) for each in (first, other)]
    sentence = f"a {phrases[0]} is {RELATION_WORDINGS[kind][wording]} a {phrases[1]}"
    return Statement((first, other), (Relation(kind, 0, 1, wording),)), sentence


def _style(rng: SceneRng) -> int:
    """Draw 0 or 1, the index of a synonym."""
    return int(rng.uniform() * 2)


_MAKERS: dict[str, Callable[[Scene, list[SceneObject], SceneRng], _Claim | None]] = {
    "cell": _in_cell,
    "side": _at_side,
    "relation": _relation,
}
