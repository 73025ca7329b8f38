"""Grammar of the captions: meaning, truth and wording, with the objects that each phrase refers to.

A caption is written from a `Draft`: a `Statement` (the meaning) and a template (the wording). Truth depends only on
the statement, so a draft with one changed fact is a foil with the same wording.

Meaning of the words:
- "a small red circle" claims an object with these attributes; two such phrases in a caption refer to two objects;
- "left of", "right of", "above" and "below" compare the centres along one axis, at least `RELATION_MARGIN` apart;
- "larger than" and "smaller than" compare size words, never radii within one size;
- "in the northwest" is the grid cell that contains an object's centre; "left of the centre" means that this cell is
  left of the middle column;
- every count is exact: "two red circles" is false if there are three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mamo.world.scene import CELLS, COLOURS, PATTERNS, SHAPES, Scene, SceneObject

RELATION_MARGIN = 0.13  # fraction of the image side

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium"), "large": ("large", "big")}
NOUNS = ("shape", "object")  # if the shape is not mentioned
PLACES = (  # cells of the grid, row by row; no relation uses these words
    ("northwest", "north", "northeast"),
    ("west", "centre", "east"),
    ("southwest", "south", "southeast"),
)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATION_WORDINGS: dict[str, tuple[str, ...]] = {  # at the same index, opposites differ by one word
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "larger": ("larger than", "bigger than"),
    "smaller": ("smaller than", "smaller than"),
    "same colour": ("the same colour as", "of the same colour as"),
    "same shape": ("the same shape as", "of the same shape as"),
    "same size": ("the same size as", "as large as"),
}


def plural(noun: str) -> str:
    """Return the plural of a noun of the vocabulary."""
    return noun + ("es" if noun[-1] == "s" else "s")


WORD_CLASSES: dict[str, frozenset[str]] = {
    "colour": frozenset(COLOURS),
    "shape": frozenset(word for shape in SHAPES["full"] for word in (shape, plural(shape))),
    "size": frozenset(word for words in SIZE_WORDS.values() for word in words),
    "pattern": frozenset(PATTERNS["full"]),
    "relation": frozenset({"left", "right", "above", "below", "higher", "lower", "larger", "bigger", "smaller"}),
    "number": frozenset(NUMBERS[1:]),
    "place": frozenset(place for row in PLACES for place in row),
}


@dataclass(frozen=True, slots=True)
class Phrase:
    """Characters `start` to `end` (exclusive) of a caption, and the indices of the objects they refer to."""

    start: int
    end: int
    objects: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Caption:
    """One lower-case sentence about a scene, and its object phrases in reading order."""

    text: str
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """Attributes of an object; an empty one is not mentioned. `place` is a word of `PLACES` or `sides_of`."""

    shape: str = ""
    colour: str = ""
    size: str = ""
    pattern: str = ""
    place: str = ""

    def matches(self, obj: SceneObject) -> bool:
        """Return whether `obj` has all mentioned attributes."""
        return (
            self.shape in ("", obj.shape)
            and self.colour in ("", obj.colour)
            and self.size in ("", obj.size)
            and self.pattern in ("", obj.pattern)
            and self.place in ("", place_of(obj), *sides_of(obj))
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """Relation `kind` (a key of `RELATION_WORDINGS`) from mention `first` to mention `second`, in wording `wording`."""

    kind: str
    first: int
    second: int
    wording: int = 0


@dataclass(frozen=True, slots=True)
class Count:
    """Claim that exactly `number` objects of the scene match `description`."""

    description: Description
    number: int


@dataclass(frozen=True, slots=True)
class Statement:
    """Meaning of a caption: distinct objects match `mentions`, with these `relations`, and all `counts` are exact."""

    mentions: tuple[Description, ...] = ()
    relations: tuple[Relation, ...] = ()
    counts: tuple[Count, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """Input of `write`: meaning, wording and synonyms of a caption.

    `template` is text with references, each a letter and an index: `{m0}` a mention, `{r0}` a relation, `{c0}` a
    count ("two red circles"), `{p0}` a count as part of a total ("two of them red"), `{g0}` and `{n0}` the group and
    the number of a count ("red circles", "two"). `referents` are the indices of the objects that the mentions refer
    to. `size_style` (0 or 1) indexes `SIZE_WORDS`. `noun_style` (0 or 1) indexes `NOUNS`, and `RELATION_WORDINGS` for
    a side of the centre.
    """

    statement: Statement
    template: str
    referents: tuple[int, ...]
    size_style: int
    noun_style: int


def place_of(obj: SceneObject) -> str:
    """Return the word of `PLACES` for the cell that contains the object's centre."""
    return PLACES[int(obj.centre_y * CELLS)][int(obj.centre_x * CELLS)]


def sides_of(obj: SceneObject) -> list[str]:
    """Return the relations of the object's cell to the middle one: "left" or "right", "above" or "below", or none."""
    column, row = (int(centre * CELLS) - CELLS // 2 for centre in (obj.centre_x, obj.centre_y))
    return ["left" if column < 0 else "right"] * (column != 0) + ["above" if row < 0 else "below"] * (row != 0)


def relation_holds(kind: str, a: SceneObject, b: SceneObject, margin: float = RELATION_MARGIN) -> bool:
    """Return whether `kind` holds from `a` to `b`. `margin` is the least distance along the axis, in image sides."""
    if kind == "left":
        return b.centre_x - a.centre_x > margin
    if kind == "right":
        return a.centre_x - b.centre_x > margin
    if kind == "above":
        return b.centre_y - a.centre_y > margin
    if kind == "below":
        return a.centre_y - b.centre_y > margin
    if kind in ("larger", "smaller"):
        order = tuple(SIZE_WORDS)
        difference = order.index(a.size) - order.index(b.size)
        return difference > 0 if kind == "larger" else difference < 0
    attribute = kind.removeprefix("same ")
    return bool(getattr(a, attribute) == getattr(b, attribute))


def is_true(statement: Statement, objects: Sequence[SceneObject], margin: float = RELATION_MARGIN) -> bool:
    """Return whether `statement` is true of a scene with these objects.

    With `margin=0.0` any positive distance makes a relation true. Foils are verified so: a statement that is false then
    is false under any reading.
    """
    if any(sum(count.description.matches(obj) for obj in objects) != count.number for count in statement.counts):
        return False
    return _assign(statement, objects, (), margin)


def _assign(statement: Statement, objects: Sequence[SceneObject], taken: tuple[int, ...], margin: float) -> bool:
    """Assign distinct objects to the mentions after the first `len(taken)`; return whether this is possible."""
    if any(
        not relation_holds(relation.kind, objects[taken[relation.first]], objects[taken[relation.second]], margin)
        for relation in statement.relations
        if max(relation.first, relation.second) == len(taken) - 1
    ):
        return False
    if len(taken) == len(statement.mentions):
        return True
    mention = statement.mentions[len(taken)]
    return any(
        _assign(statement, objects, (*taken, i), margin)
        for i, obj in enumerate(objects)
        if i not in taken and mention.matches(obj)
    )


def write(draft: Draft, objects: Sequence[SceneObject]) -> Caption:
    """Write the draft as text with the span of each phrase. `objects` are those of the scene."""
    text = ""
    phrases: list[Phrase] = []
    for piece in draft.template.split():
        text += " " if text else ""
        if piece[0] != "{":
            text += piece
            continue
        reference, tail = piece[1:].split("}")
        kind, index = reference[0], int(reference[1:])
        start = len(text)
        if kind == "r":
            relation = draft.statement.relations[index]
            text += RELATION_WORDINGS[relation.kind][relation.wording]
        elif kind == "m":
            mention = draft.statement.mentions[index]
            text += "a " + noun_phrase(mention, False, draft.size_style, draft.noun_style)
            phrases.append(Phrase(start, len(text), (draft.referents[index],)))
        else:
            count = draft.statement.counts[index]
            text += _count_phrase(draft, kind, count)
            if kind != "n":
                referents = tuple(i for i, obj in enumerate(objects) if count.description.matches(obj))
                phrases.append(Phrase(start, len(text), referents))
        text += tail
    return Caption(text, tuple(phrases))


def _count_phrase(draft: Draft, kind: str, count: Count) -> str:
    number = NUMBERS[count.number]
    if kind == "n":
        return number
    if kind == "p":
        return f"{number} of them {_adjectives(count.description, draft.size_style)}"
    phrase = noun_phrase(count.description, kind == "g" or count.number > 1, draft.size_style, draft.noun_style)
    return phrase if kind == "g" else f"{number} {phrase}"


def noun_phrase(description: Description, many: bool = False, size_style: int = 0, noun_style: int = 1) -> str:
    """Write a description without an article: "small red circle in the north".

    Attributes that are not mentioned are omitted. `many` selects the plural. The styles are those of `Draft`.
    """
    noun = description.shape or NOUNS[noun_style]
    where = ""
    if description.place:
        sides = RELATION_WORDINGS.get(description.place)
        where = f" {sides[noun_style]} the centre" if sides else f" in the {description.place}"
    return f"{_adjectives(description, size_style)} {plural(noun) if many else noun}{where}".strip()


def _adjectives(description: Description, size_style: int) -> str:
    size = SIZE_WORDS[description.size][size_style] if description.size else ""
    return " ".join(word for word in (size, description.pattern, description.colour) if word)


def describe(scene: Scene, obj: SceneObject) -> Description:
    """Return all attributes of an object of the scene except its place; the pattern only in the full world."""
    pattern = obj.pattern if scene.difficulty == "full" else ""  # in `easy` all are solid
    return Description(obj.shape, obj.colour, obj.size, pattern)


def keep_attributes(description: Description, *aspects: str) -> Description:
    """Return `description` reduced to the attributes `aspects`."""
    return Description(**{aspect: getattr(description, aspect) for aspect in aspects})
