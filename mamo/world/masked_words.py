"""Masked words of captions: which word is asked for, and which answers are right."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mamo.world.captions import N_CAPTIONS, caption_draft
from mamo.world.grammar import (
    NUMBERS,
    OPPOSITE,
    PLACES,
    RELATION_WORDINGS,
    SIZE_WORDS,
    Description,
    Draft,
    Statement,
    is_true,
    write,
)
from mamo.world.scene import COLOURS, PATTERNS, SHAPES, SIZES, Difficulty, Scene, SceneWorld, Split

_STREAM = 17  # of the scene's randomness; captions and probes use lower ones


_ADJECTIVES = ("size", "pattern", "colour")  # in the order in which the grammar writes them


_COUNTING = 3  # the caption that counts


@dataclass(frozen=True, slots=True)
class MaskedWord:
    """The word of `word_class` at characters `start` to `end` of `caption`; each of `answers` is right."""

    scene_index: int
    word_class: str
    caption: str
    start: int
    end: int
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A fact that one word says: `attribute` of entry `index` of the statement's `group`."""

    draft: Draft
    group: str
    index: int
    attribute: str


def masked_words(world: SceneWorld, n_scenes: int, split: Split = "test") -> list[MaskedWord]:
    """At most one masked word a class for each of the first `n_scenes` scenes; a pure function.

    The classes are colour, shape, size, pattern and place (in the full world), relation and number. The word is drawn
    among the decided ones of the scene's five captions by the scene's own random numbers.
    """
    return [item for index in range(n_scenes) for item in _masked_words(world.scene(split, index))]


def _masked_words(scene: Scene) -> Iterator[MaskedWord]:
    slots: dict[str, list[_Slot]] = defaultdict(list)
    for which in range(N_CAPTIONS):
        for slot in _slots(caption_draft(scene, which), has_numbers=which == _COUNTING):
            slots[slot.attribute].append(slot)
    draws = scene.draws(_STREAM)
    for word_class, candidates in slots.items():
        for k in draws.shuffled(len(candidates)):
            alternatives = list(_alternatives(candidates[k], scene.difficulty))
            if not any(is_true(statement, scene.objects, margin=0.0) for statement in alternatives):
                yield _item(scene, word_class, candidates[k].draft, alternatives[0])
                break


def _slots(draft: Draft, has_numbers: bool) -> Iterator[_Slot]:
    statement = draft.statement
    whats = [("mentions", k, what) for k, what in enumerate(statement.mentions)]
    whats += [("counts", k, count.what) for k, count in enumerate(statement.counts)]
    for group, k, what in whats:
        for attribute in ("shape", "place", *_ADJECTIVES):
            value = getattr(what, attribute)
            if value and value not in OPPOSITE:  # a side of the centre is said in words of relations
                yield _Slot(draft, group, k, attribute)
    for k, count in enumerate(statement.counts if has_numbers else ()):
        if count.number != 1 or f"{{c{k}}}" not in draft.template:  # that reference writes "one circle", "two circles"
            yield _Slot(draft, "counts", k, "number")
    for k, relation in enumerate(statement.relations):
        if relation.kind in OPPOSITE and not any(what.place for what in statement.mentions):
            yield _Slot(draft, "relations", k, "relation")


def _alternatives(slot: _Slot, difficulty: Difficulty) -> Iterator[Statement]:
    """What the caption would say with each other word at the slot; the first differs in the slot's word alone."""
    entries = getattr(slot.draft.statement, slot.group)
    entry = entries[slot.index]
    changed: list[object]
    if slot.attribute == "number":
        changed = [replace(entry, number=number) for number in range(1, len(NUMBERS)) if number != entry.number]
    elif slot.attribute == "relation":
        changed = [replace(entry, kind=kind, wording=w) for kind, w in _other_relations(entry.kind, entry.wording)]
    else:
        what = entry if slot.group == "mentions" else entry.what
        others = _other_descriptions(what, slot.attribute, difficulty)
        changed = [other if slot.group == "mentions" else replace(entry, what=other) for other in others]
    for other in changed:
        yield replace(slot.draft.statement, **{slot.group: (*entries[: slot.index], other, *entries[slot.index + 1 :])})


def _other_relations(kind: str, wording: int) -> list[tuple[str, int]]:
    """Relations whose words differ from this one's at one place, its opposite first."""
    words = RELATION_WORDINGS[kind][wording].split()
    found = [(OPPOSITE[kind], wording)]
    for other, texts in RELATION_WORDINGS.items():
        for w, text in enumerate(texts):
            theirs = text.split()
            if len(theirs) == len(words) and sum(a != b for a, b in zip(words, theirs)) == 1:
                found.append((other, w))
    return found


def _other_descriptions(what: Description, attribute: str, difficulty: Difficulty) -> Iterator[Description]:
    """`what` with another value of `attribute`, or with a word of an unsaid attribute in its place."""
    patterns = PATTERNS[difficulty]
    values = {
        "shape": SHAPES[difficulty],
        "colour": tuple(COLOURS),
        "size": tuple(SIZES[difficulty]),
        "pattern": patterns if len(patterns) > 1 else (),  # one pattern alone is never said
        "place": [place for row in PLACES for place in row],
    }
    for value in values[attribute]:
        if value != getattr(what, attribute):
            yield replace(what, **{attribute: value})
    if attribute not in _ADJECTIVES:
        return
    here = _ADJECTIVES.index(attribute)
    for there, other in enumerate(_ADJECTIVES):
        between = _ADJECTIVES[min(here, there) : max(here, there) + 1]
        if other != attribute and not any(getattr(what, name) for name in between if name != attribute):
            for value in values[other]:
                yield replace(what, **{attribute: "", other: value})


def _item(scene: Scene, word_class: str, draft: Draft, alternative: Statement) -> MaskedWord:
    caption = write(draft, scene.objects).text
    words = caption.split()
    other_words = write(replace(draft, statement=alternative), scene.objects).text.split()
    at = next(k for k, (word, other) in enumerate(zip(words, other_words)) if word != other)
    word = words[at].rstrip(",:")
    start = len(" ".join(words[:at])) + (at > 0)
    answers = next((synonyms for synonyms in SIZE_WORDS.values() if word in synonyms), (word,))
    return MaskedWord(scene.index, word_class, caption, start, start + len(word), tuple(dict.fromkeys(answers)))
