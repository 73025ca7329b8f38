"""Fine-grained understanding of the embedded world: foils told from captions, and masked words filled in.

A word is masked only where the picture decides it: every other word that the grammar could write at its place makes
the caption false. "a small [MASK] circle" is asked of one small circle or of two of one colour, never of a red and a
blue one; "a [MASK] circle" is not asked, since its size and its colour would both be right; "higher than" is asked only
where neither "larger than" nor "smaller than" is true. Numbers come from the counting caption alone, since the others
list what they count, and never from "one circle", whose noun gives the number away. A caption that says where objects
are is asked for places, never for relations, which would follow from them. Either of two synonyms ("small", "little")
is right.

Legend: N items, W tokens of the masked word, A right answers of an item.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamo.data.grammar import (
    NUMBERS,
    OPPOSITE,
    PLACES,
    RELATION_WORDINGS,
    SIZE_WORDS,
    Description,
    Draft,
    Statement,
    holds,
    write,
)
from mamo.data.probes import ProbeItem
from mamo.data.scene_captions import N_CAPTIONS, caption_draft
from mamo.data.scenes import COLOURS, PATTERNS, SHAPES, SIZES, Difficulty, Scene, SceneWorld, Split
from mamo.evaluation.scoring import EncodedImages, Scorer, WordFiller

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
            if not any(holds(statement, scene.objects, margin=0.0) for statement in alternatives):
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


def preferred(true_score: Tensor, foil_score: Tensor) -> float:
    """Scores [N] each -> how often the caption scores above its foil, in percent; a tie is half right."""
    right = (true_score > foil_score).double() + 0.5 * (true_score == foil_score).double()
    return 100.0 * right.mean().item()


def probe_accuracy(
    scorer: Scorer, images: EncodedImages, items: Sequence[ProbeItem], image_row: dict[int, int]
) -> dict[str, float]:
    """Accuracy in percent by "itc" and by "itm", where the network has them; `image_row` by scene index."""
    texts = scorer.encode_texts(*scorer.tokenize([item.caption for item in items] + [item.foil for item in items]))
    image_rows = torch.tensor([image_row[item.scene_index] for item in items]).repeat(2)
    text_rows = torch.arange(2 * len(items))
    accuracy = {}
    if scorer.network.temperature is not None:
        accuracy["itc"] = preferred(*scorer.similarity(images, texts, image_rows, text_rows).chunk(2))
    if scorer.network.itm is not None:
        accuracy["itm"] = preferred(*scorer.match(images, texts, image_rows, text_rows).chunk(2))
    return accuracy


def masked_word_accuracy(
    scorer: WordFiller, images: Any, items: Sequence[MaskedWord], image_row: dict[int, int]
) -> dict[str, float]:
    """How often `fill_masked_words` finds a right word, in percent by word class."""
    filled = fill_masked_words(scorer, images, items, image_row)
    return {
        name: 100.0 * float(np.mean([is_right for item, _, is_right in filled if item.word_class == name]))
        for name in dict.fromkeys(item.word_class for item, _, _ in filled)
    }


def fill_masked_words(
    scorer: WordFiller, images: Any, items: Sequence[MaskedWord], image_row: dict[int, int]
) -> list[tuple[MaskedWord, str, bool]]:
    """Each item with what the likeliest tokens spell, and whether that is right; `images` as the scorer has them.

    All tokens of the word are masked, and all must be right at once. A synonym counts if it has as many tokens as the
    word. An item whose word was cut off with the end of a long caption is left out.
    """
    encoded = scorer.tokenizer(
        [item.caption for item in items],
        padding=True,
        truncation=True,
        max_length=scorer.text_max_tokens,
        return_offsets_mapping=True,
    )
    starts, ends = torch.tensor(encoded["offset_mapping"]).unbind(dim=-1)  # [N, L] each
    spans = torch.tensor([(item.start, item.end) for item in items])
    is_masked = (starts >= spans[:, :1]) & (ends <= spans[:, 1:]) & (ends > starts)  # [N, L]
    kept = is_masked.any(dim=1).nonzero()[:, 0]
    if not len(kept):
        return []
    is_masked, lengths = is_masked[kept], torch.tensor(encoded["attention_mask"]).sum(dim=1)[kept]
    items = [items[k] for k in kept.tolist()]
    n_tokens = is_masked.sum(dim=1)  # [N]
    is_slot = torch.arange(int(n_tokens.max())) < n_tokens[:, None]  # [N, W]
    slots = torch.zeros(is_slot.shape, dtype=torch.int64)
    slots[is_slot] = is_masked.nonzero()[:, 1]
    input_ids = torch.tensor(encoded["input_ids"])[kept].masked_fill(is_masked, scorer.tokenizer.mask_token_id)
    texts = scorer.encode_texts(input_ids, lengths)
    rows = torch.tensor([image_row[item.scene_index] for item in items])
    filled = scorer.fill(images, texts, rows, torch.arange(len(items)), slots)  # [N, W]
    answers = _answer_tokens(scorer, items, n_tokens)  # [N, A, W]
    is_right = ((filled[:, None] == answers) | ~is_slot[:, None]).all(dim=2).any(dim=1)  # [N]
    spelled = [scorer.tokenizer.decode(row[:n]) for row, n in zip(filled, n_tokens.tolist())]
    return list(zip(items, spelled, is_right.tolist(), strict=True))


def _answer_tokens(scorer: WordFiller, items: Sequence[MaskedWord], n_tokens: Tensor) -> Tensor:
    """The tokens of each right answer, int64 [N, A, W]; -1 (never predicted) where an answer has another length."""
    most = max(len(item.answers) for item in items)
    tokens = torch.full((len(items), most, int(n_tokens.max())), -1)
    spelling = {
        word: torch.tensor(scorer.tokenizer(word, add_special_tokens=False)["input_ids"])
        for word in {answer for item in items for answer in item.answers}
    }
    for row, (item, n) in enumerate(zip(items, n_tokens.tolist(), strict=True)):
        for column, answer in enumerate(item.answers):
            if len(spelling[answer]) == n:
                tokens[row, column, :n] = spelling[answer]
    return tokens
