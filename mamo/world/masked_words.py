"""Masked words of captions: the word to predict and its right answers."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mamo.data.cleaning import Cleaning, cleaner
from mamo.world.captions import COUNTING, N_CAPTIONS, caption_draft
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
from mamo.world.scene import Difficulty, Scene, SceneWorld, Split, attribute_values

_STREAM = 17  # random stream of the scene
_ADJECTIVES = ("size", "pattern", "colour")  # in the order of the grammar


@dataclass(frozen=True, slots=True)
class MaskedWord:
    """A word of `word_class`, characters `start` to `end` of `caption`. Each of `answers` is right."""

    scene_index: int
    word_class: str
    caption: str
    start: int
    end: int
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """Fact expressed by one word: `attribute` of entry `index` of the statement's field `group`."""

    draft: Draft
    group: str
    index: int
    attribute: str


def masked_word_items(world: SceneWorld, n_scenes: int, split: Split = "test") -> list[MaskedWord]:
    """Return at most one masked word of each class for each of the first `n_scenes` scenes; a pure function.

    The classes are colour, shape, size, relation, number and, in the full world, pattern and place. The word is drawn
    among those of the scene's five captions for which no other word makes the caption true.
    """
    return [item for index in range(n_scenes) for item in _scene_items(world.scene(split, index))]


def cleaned_items(items: Sequence[MaskedWord], cleaning: Cleaning) -> list[MaskedWord]:
    """Return the items with their captions cleaned; leave out words beyond those that cleaning keeps.

    Captions of the embedded world need no cleaning but ALBEF's.
    """
    if cleaning == "plain":
        return list(items)
    clean, found = cleaner(cleaning), []
    for item in items:
        word, caption = item.caption[item.start : item.end].lower(), clean(item.caption)
        start = len(clean(item.caption[: item.start] + "x")) - 1
        if caption[start : start + len(word)] == word:
            found.append(replace(item, caption=caption, start=start, end=start + len(word)))
    return found


def _scene_items(scene: Scene) -> Iterator[MaskedWord]:
    """Yield the masked words of a scene."""
    slots: dict[str, list[_Slot]] = defaultdict(list)
    for caption_index in range(N_CAPTIONS):
        for slot in _slots(caption_draft(scene, caption_index), has_numbers=caption_index == COUNTING):
            slots[slot.attribute].append(slot)
    rng = scene.rng(_STREAM)
    for word_class, candidates in slots.items():
        for k in rng.permutation(len(candidates)):
            alternatives = list(_alternatives(candidates[k], scene.difficulty))
            if not any(is_true(statement, scene.objects, margin=0.0) for statement in alternatives):
                yield _item(scene, word_class, candidates[k].draft, alternatives[0])
                break


def _slots(draft: Draft, has_numbers: bool) -> Iterator[_Slot]:
    """Yield the facts of a draft that one word expresses; numbers only with `has_numbers`."""
    statement = draft.statement
    described = [("mentions", k, description) for k, description in enumerate(statement.mentions)]
    described += [("counts", k, count.description) for k, count in enumerate(statement.counts)]
    for group, k, description in described:
        for attribute in ("shape", "place", *_ADJECTIVES):
            value = getattr(description, attribute)
            if value and value not in OPPOSITE:  # sides of the centre use the words of relations
                yield _Slot(draft, group, k, attribute)
    for k, count in enumerate(statement.counts if has_numbers else ()):
        if count.number != 1 or f"{{c{k}}}" not in draft.template:  # it writes "one circle", but "two circles"
            yield _Slot(draft, "counts", k, "number")
    for k, relation in enumerate(statement.relations):
        if relation.kind in OPPOSITE and not any(description.place for description in statement.mentions):
            yield _Slot(draft, "relations", k, "relation")


def _alternatives(slot: _Slot, difficulty: Difficulty) -> Iterator[Statement]:
    """Yield the statement for each other word at the slot. The first differs only in the attribute of the slot."""
    entries = getattr(slot.draft.statement, slot.group)
    entry = entries[slot.index]
    changed: list[object]
    if slot.attribute == "number":
        changed = [replace(entry, number=number) for number in range(1, len(NUMBERS)) if number != entry.number]
    elif slot.attribute == "relation":
        changed = [replace(entry, kind=kind, wording=w) for kind, w in _other_relations(entry.kind, entry.wording)]
    else:
        description = entry if slot.group == "mentions" else entry.description
        others = _other_descriptions(description, slot.attribute, difficulty)
        changed = [other if slot.group == "mentions" else replace(entry, description=other) for other in others]
    for other in changed:
        yield replace(slot.draft.statement, **{slot.group: (*entries[: slot.index], other, *entries[slot.index + 1 :])})


def _other_relations(kind: str, wording: int) -> list[tuple[str, int]]:
    """Return the relations whose wording differs from this one by one word, the opposite first."""
    words = RELATION_WORDINGS[kind][wording].split()
    found = [(OPPOSITE[kind], wording)]
    for other, texts in RELATION_WORDINGS.items():
        for w, text in enumerate(texts):
            other_words = text.split()
            if len(other_words) == len(words) and sum(a != b for a, b in zip(words, other_words)) == 1:
                found.append((other, w))
    return found


def _other_descriptions(description: Description, attribute: str, difficulty: Difficulty) -> Iterator[Description]:
    """Yield `description` with another value of `attribute`, or with an adjective of an omitted attribute instead."""
    for value in _words(attribute, difficulty):
        if value != getattr(description, attribute):
            yield replace(description, **{attribute: value})
    if attribute not in _ADJECTIVES:
        return
    here = _ADJECTIVES.index(attribute)
    for there, other in enumerate(_ADJECTIVES):
        between = _ADJECTIVES[min(here, there) : max(here, there) + 1]
        if other != attribute and not any(getattr(description, name) for name in between if name != attribute):
            for value in _words(other, difficulty):
                yield replace(description, **{attribute: "", other: value})


def _words(attribute: str, difficulty: Difficulty) -> Sequence[str]:
    """Return the words that captions use for an attribute. A pattern is not mentioned if there is only one."""
    if attribute == "place":
        return [place for row in PLACES for place in row]
    values = attribute_values(attribute, difficulty)
    return values if len(values) > 1 else ()


def _item(scene: Scene, word_class: str, draft: Draft, alternative: Statement) -> MaskedWord:
    """Locate the masked word: the first word that differs between the draft and `alternative`."""
    caption = write(draft, scene.objects).text
    words = caption.split()
    other_words = write(replace(draft, statement=alternative), scene.objects).text.split()
    at = next(k for k, (word, other) in enumerate(zip(words, other_words)) if word != other)
    word = words[at].rstrip(",:")
    start = len(" ".join(words[:at])) + (at > 0)
    answers = next((synonyms for synonyms in SIZE_WORDS.values() if word in synonyms), (word,))
    return MaskedWord(scene.index, word_class, caption, start, start + len(word), tuple(dict.fromkeys(answers)))
