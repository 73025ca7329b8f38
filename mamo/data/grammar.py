"""Captions of the embedded data set: what is said of a scene, which words mean which object, and whether it is true.

A caption is written from a `Draft`: a `Statement`, which is the meaning, and a template, which is the wording. The
statement alone decides truth, so a draft with one fact changed is a foil of the same wording.

Meaning of the words:
- "a small red circle" claims an object with these attributes; two such phrases of a caption mean two objects;
- "left of", "right of", "above" and "below" compare the centres along one axis, at least `RELATION_MARGIN` apart;
- "on the left" and the like compare a centre with the middle of the image, at least `RELATION_MARGIN` from it;
- "larger than" and "smaller than" compare size words, never radii within one size;
- every count is exact: "two red circles" is false where there are three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mamo.data.scenes import COLOURS, PATTERNS, SHAPES, Draws, Scene, SceneObject

RELATION_MARGIN = 0.13  # fraction of the image side
N_CAPTIONS = 5
_FIRST_CAPTION_STREAM = 2  # streams 0 and 1 of a scene are its objects and its pixel noise
_IDENTIFYING_STREAM = _FIRST_CAPTION_STREAM + N_CAPTIONS

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium"), "large": ("large", "big")}
NOUNS = ("shape", "object")  # for "any shape"
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
PLACE_WORDINGS: dict[str, tuple[str, ...]] = {
    "on the left": ("on the left", "at the left"),
    "on the right": ("on the right", "at the right"),
    "at the top": ("at the top", "in the top half"),
    "at the bottom": ("at the bottom", "in the bottom half"),
}
PLACED_SHARE = 0.5  # of the captions that relate two objects: these say instead where in the image objects are
TOTAL_OPENINGS = ("", "there are", "exactly")


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
    """What is said of an object; an empty attribute is not said."""

    shape: str = ""
    colour: str = ""
    size: str = ""
    pattern: str = ""

    def fits(self, thing: SceneObject) -> bool:
        """Whether all that is said is true of `thing`."""
        return (
            self.shape in ("", thing.shape)
            and self.colour in ("", thing.colour)
            and self.size in ("", thing.size)
            and self.pattern in ("", thing.pattern)
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """`kind` holds from mention `first` to mention `second`; `wording` is its style.

    `kind` is a key of `RELATION_WORDINGS`, or of `PLACE_WORDINGS` with the same mention twice.
    """

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
    (0 or 1, into `SIZE_WORDS`) and `noun_style` (into `NOUNS`) choose synonyms.
    """

    statement: Statement
    template: str
    referents: tuple[int, ...]
    size_style: int
    noun_style: int


def relation_holds(kind: str, a: SceneObject, b: SceneObject, margin: float = RELATION_MARGIN) -> bool:
    """Whether `a` stands in relation `kind` to `b`; `margin` is the least distance along the axis, in image sides."""
    if kind in PLACE_WORDINGS:
        right, down = a.centre_x - 0.5, a.centre_y - 0.5
        inside = {"on the left": -right, "on the right": right, "at the top": -down, "at the bottom": down}
        return inside[kind] > margin
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


def holds(statement: Statement, objects: Sequence[SceneObject], margin: float = RELATION_MARGIN) -> bool:
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
            wordings = PLACE_WORDINGS.get(relation.kind) or RELATION_WORDINGS[relation.kind]
            text += wordings[relation.wording]
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
    """Adjectives and a noun, without an article: "small red circle". The styles are those of `Draft`."""
    noun = what.shape or NOUNS[noun_style]
    return f"{_adjectives(what, size_style)} {plural(noun) if many else noun}".strip()


def _adjectives(what: Description, size_style: int) -> str:
    size = SIZE_WORDS[what.size][size_style] if what.size else ""
    return " ".join(word for word in (size, what.pattern, what.colour) if word)


def captions(scene: Scene) -> tuple[Caption, ...]:
    """The scene's five captions: see `caption`."""
    return tuple(caption(scene, which) for which in range(N_CAPTIONS))


def caption(scene: Scene, which: int) -> Caption:
    """Caption `which` of `scene`: 0 and 1 describe all, 2 relates two objects or places some, 3 counts, 4 compares two.

    A pure function of the scene. Raises ValueError where `which` is not in 0 to 4.
    """
    return write(caption_draft(scene, which), scene.objects)


def identifying_caption(scene: Scene) -> Caption:
    """The retrieval caption: all objects with all attributes and some relations, true of hardly any other scene.

    It is worded like captions 0 and 1. For two objects it says that there are two: other scenes may hold such a pair.
    """
    return write(identifying_draft(scene), scene.objects)


def identifying_draft(scene: Scene) -> Draft:
    """The draft of `identifying_caption`."""
    return _full(scene, scene.draws(_IDENTIFYING_STREAM), total_probability=0.0)


def caption_draft(scene: Scene, which: int) -> Draft:
    """The draft of caption `which`, from which the probes make foils."""
    if not 0 <= which < N_CAPTIONS:
        raise ValueError(f"scenes: caption {which} does not exist; a scene has captions 0 to {N_CAPTIONS - 1}")
    draws = scene.draws(_FIRST_CAPTION_STREAM + which)
    if which < 2:
        return _full(scene, draws, total_probability=0.25)
    makers: tuple[Callable[[Scene, Draws], Draft], ...] = (_partial, _counting, _comparing)
    return makers[which - 2](scene, draws)


def describe(scene: Scene, thing: SceneObject) -> Description:
    """All that is worth saying of one of the scene's objects."""
    pattern = thing.pattern if scene.difficulty == "full" else ""  # all are solid in `easy`
    return Description(thing.shape, thing.colour, thing.size, pattern)


def _axes(scene: Scene, a: int, b: int) -> list[str]:
    """The spatial relations from object `a` to `b` that hold, the clearest first; at least one does."""
    first, second = scene.objects[a], scene.objects[b]
    dx, dy = first.centre_x - second.centre_x, first.centre_y - second.centre_y
    kinds = ["left" if dx < 0 else "right", "above" if dy < 0 else "below"]
    if abs(dy) > abs(dx):
        kinds.reverse()
    return [kind for kind in kinds if relation_holds(kind, first, second)]


def _full(scene: Scene, draws: Draws, total_probability: float) -> Draft:
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


def _partial(scene: Scene, draws: Draws) -> Draft:
    """Two objects by some of their attributes, and where one is from the other, or where in the image some are."""
    if draws.uniform() < PLACED_SHARE and (placed := _placed(scene, draws)) is not None:
        return placed
    a, b = draws.shuffled(len(scene.objects))[:2]
    mentions = tuple(_some(describe(scene, scene.objects[i]), draws) for i in (a, b))
    relation = Relation(draws.pick(_axes(scene, a, b)), 0, 1, _style(draws))
    templates = ["{m0} is {r0} {m1}", "there is {m0} {r0} {m1}", "{m0} {r0} {m1}"]
    if RELATION_WORDINGS[relation.kind][relation.wording] in ("to the left of", "to the right of", "above", "below"):
        templates += ["{r0} {m1} is {m0}", "{r0} {m1} we see {m0}"]
    return Draft(Statement(mentions, (relation,)), draws.pick(templates), (a, b), _style(draws), _style(draws))


def _placed(scene: Scene, draws: Draws) -> Draft | None:
    """Two objects that are not in the middle (or one), and where they are; None where all are in the middle."""
    found = [(i, kind) for i in draws.shuffled(len(scene.objects)) for kind in _places(scene.objects[i], draws)][:2]
    if not found:
        return None
    mentions = tuple(_some(_describe(scene, i), draws) for i, _ in found)
    relations = tuple(Relation(kind, k, k, _style(draws)) for k, (_, kind) in enumerate(found))
    template = draws.pick(("{m0} {r0}", "{m0} is {r0}", "there is {m0} {r0}", "{r0} there is {m0}", "{r0} we see {m0}"))
    template += " and {m1} {r1}" if len(found) > 1 else ""
    return Draft(Statement(mentions, relations), template, tuple(i for i, _ in found), _style(draws), _style(draws))


def _places(thing: SceneObject, draws: Draws) -> list[str]:
    """One of the places that hold of `thing`, or nothing."""
    kinds = [kind for kind in PLACE_WORDINGS if relation_holds(kind, thing, thing)]
    return [draws.pick(kinds)] if kinds else []


def _some(what: Description, draws: Draws) -> Description:
    """`what` with some attributes unsaid, but always the shape or the colour."""
    keep = draws.uniform()
    return replace(
        what,
        shape="" if keep < 0.12 else what.shape,
        colour="" if keep > 0.85 else what.colour,
        size=what.size if draws.uniform() < 0.6 else "",
        pattern=what.pattern if draws.uniform() < 0.6 else "",
    )


def _counting(scene: Scene, draws: Draws) -> Draft:
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


def only(what: Description, *aspects: str) -> Description:
    """`what` with these attributes alone."""
    return Description(**{aspect: getattr(what, aspect) for aspect in aspects})


def _exact(scene: Scene, kinds: list[Description]) -> list[Count]:
    return [Count(kind, sum(kind.fits(thing) for thing in scene.objects)) for kind in dict.fromkeys(kinds)]


def _style(draws: Draws) -> int:
    return int(draws.uniform() * 2)


def _comparing(scene: Scene, draws: Draws) -> Draft:
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
