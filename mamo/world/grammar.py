"""Captions of the embedded data set: what is said of a scene, which words mean which object, and whether it is true.

A caption is written from a `Draft`: a `Statement`, which is the meaning, and a template, which is the wording. The
statement alone decides truth, so a draft with one fact changed is a foil of the same wording.

Meaning of the words:
- "a small red circle" claims an object with these attributes; two such phrases of a caption mean two objects;
- "left of", "right of", "above" and "below" compare the centres along one axis, at least `RELATION_MARGIN` apart;
- "larger than" and "smaller than" compare size words, never radii within one size;
- "in the northwest" means the cell of the grid in which an object's centre stands, "left of the centre" that this cell
  is left of the middle column;
- every count is exact: "two red circles" is false where there are three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mamo.world.scene import CELLS, COLOURS, PATTERNS, SHAPES, Scene, SceneObject

RELATION_MARGIN = 0.13  # fraction of the image side

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium"), "large": ("large", "big")}
NOUNS = ("shape", "object")  # for "any shape"
PLACES = (  # the cells of the grid in which objects stand, row by row; none of these words is also a relation's
    ("northwest", "north", "northeast"),
    ("west", "centre", "east"),
    ("southwest", "south", "southeast"),
)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATION_WORDINGS: dict[str, tuple[str, ...]] = {  # opposites differ by one word at the same position of the tuple
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
    """The plural of one of our nouns."""
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
    """The characters `start` to `end` (exclusive) of a caption, and the indices of the objects that they mean."""

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
    """What is said of an object; an empty attribute is not said. `place` is one of `PLACES` or of `sides_of`."""

    shape: str = ""
    colour: str = ""
    size: str = ""
    pattern: str = ""
    place: str = ""

    def fits(self, thing: SceneObject) -> bool:
        """Whether all that is said is true of `thing`."""
        return (
            self.shape in ("", thing.shape)
            and self.colour in ("", thing.colour)
            and self.size in ("", thing.size)
            and self.pattern in ("", thing.pattern)
            and self.place in ("", place_of(thing), *sides_of(thing))
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """`kind`, a key of `RELATION_WORDINGS`, holds from mention `first` to mention `second`; `wording` is its style."""

    kind: str
    first: int
    second: int
    wording: int = 0


@dataclass(frozen=True, slots=True)
class Count:
    """Exactly `number` objects of the scene fit `what`."""

    what: Description
    number: int


@dataclass(frozen=True, slots=True)
class Statement:
    """A caption's meaning: distinct objects fit `mentions` and stand in `relations`, and all `counts` are exact."""

    mentions: tuple[Description, ...] = ()
    relations: tuple[Relation, ...] = ()
    counts: tuple[Count, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """A caption before it is written.

    `template` is text between references, each a letter and an index: `{m0}` a mention, `{r0}` a relation, `{c0}` a
    count ("two red circles"), `{p0}` a count as a part of a total ("two of them red"), `{g0}` and `{n0}` its halves
    apart ("red circles", "two"). `referents` are the indices of the objects that the mentions mean. `size_style`
    (0 or 1, into `SIZE_WORDS`) and `noun_style` (into `NOUNS`, and into `RELATION_WORDINGS` for a side of the centre)
    choose synonyms.
    """

    statement: Statement
    template: str
    referents: tuple[int, ...]
    size_style: int
    noun_style: int


def place_of(thing: SceneObject) -> str:
    """The word of `PLACES` for the cell in which the object's centre stands."""
    return PLACES[int(thing.centre_y * CELLS)][int(thing.centre_x * CELLS)]


def sides_of(thing: SceneObject) -> list[str]:
    """Where the object's cell lies of the middle one, as kinds of relations: "left", "above", both, or none."""
    column, row = (int(centre * CELLS) - CELLS // 2 for centre in (thing.centre_x, thing.centre_y))
    return ["left" if column < 0 else "right"] * (column != 0) + ["above" if row < 0 else "below"] * (row != 0)


def relation_holds(kind: str, a: SceneObject, b: SceneObject, margin: float = RELATION_MARGIN) -> bool:
    """Whether `a` stands in relation `kind` to `b`; `margin` is the least distance along the axis, in image sides."""
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
    """Whether `statement` is true of a scene with these objects.

    With `margin=0.0` every relation holds that is true by the slightest distance: what is false then is false by any
    reading, which is how foils are verified.
    """
    if any(sum(count.what.fits(thing) for thing in objects) != count.number for count in statement.counts):
        return False
    return _assign(statement, objects, (), margin)


def _assign(statement: Statement, objects: Sequence[SceneObject], taken: tuple[int, ...], margin: float) -> bool:
    """Whether the mentions from `len(taken)` on find objects, given the objects `taken` by those before."""
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
        for i, thing in enumerate(objects)
        if i not in taken and mention.fits(thing)
    )


def write(draft: Draft, objects: Sequence[SceneObject]) -> Caption:
    """The draft's text, with the phrases' spans; `objects` are the scene's."""
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
                meant = tuple(i for i, thing in enumerate(objects) if count.what.fits(thing))
                phrases.append(Phrase(start, len(text), meant))
        text += tail
    return Caption(text, tuple(phrases))


def _count_phrase(draft: Draft, kind: str, count: Count) -> str:
    number = NUMBERS[count.number]
    if kind == "n":
        return number
    if kind == "p":
        return f"{number} of them {_adjectives(count.what, draft.size_style)}"
    phrase = noun_phrase(count.what, kind == "g" or count.number > 1, draft.size_style, draft.noun_style)
    return phrase if kind == "g" else f"{number} {phrase}"


def noun_phrase(what: Description, many: bool = False, size_style: int = 0, noun_style: int = 1) -> str:
    """Adjectives, a noun and the place, where they are said, without an article: "small red circle in the north".

    The styles are those of `Draft`.
    """
    noun = what.shape or NOUNS[noun_style]
    where = ""
    if what.place:
        sides = RELATION_WORDINGS.get(what.place)
        where = f" {sides[noun_style]} the centre" if sides else f" in the {what.place}"
    return f"{_adjectives(what, size_style)} {plural(noun) if many else noun}{where}".strip()


def _adjectives(what: Description, size_style: int) -> str:
    size = SIZE_WORDS[what.size][size_style] if what.size else ""
    return " ".join(word for word in (size, what.pattern, what.colour) if word)


def describe(scene: Scene, thing: SceneObject) -> Description:
    """All that is worth saying of how one of the scene's objects looks."""
    pattern = thing.pattern if scene.difficulty == "full" else ""  # all are solid in `easy`
    return Description(thing.shape, thing.colour, thing.size, pattern)


def only(what: Description, *aspects: str) -> Description:
    """`what` with these attributes alone."""
    return Description(**{aspect: getattr(what, aspect) for aspect in aspects})
