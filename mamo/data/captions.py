"""Captions of a record: the texts under its caption keys, the draw of one of them, changes of the drawn one."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

CaptionKeys = Mapping[str, float]
"""Caption key -> weight. Empty: the key `caption`."""
CAPTION = "caption"
_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+(?=[\"'“‘(\[]?[^\W_])|(?<=[。！？])")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|[A-Z]\.[A-Z]|Mr|Mrs|Ms|Dr|St|No|vs|etc|e\.g|i\.e|approx)\.$")


def texts_of(value: object) -> list[str] | None:
    """Return the texts of a field: its text, or those of its list; none for null. None where it is something else."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    is_list = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return list(value) if is_list and isinstance(value, list) else None


def weighted_captions(
    texts: Mapping[str, Sequence[str]], keys: CaptionKeys
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the captions of a record and their weights.

    The texts of a key share its weight equally. Blank texts are left out, so that the weights of a record without one
    of the keys are those of its others, in the same proportion.

    Args:
        texts: key -> its texts.
        keys: with weights; a key of weight 0 is not read.

    Returns:
        Captions in the order of the keys, and their weights: () for equal ones. No captions where all texts are blank.
    """
    captions, weights = list[str](), list[float]()
    for key, weight in keys.items():
        shown = [text for text in texts.get(key, ()) if text.strip()] if weight else []
        captions += shown
        weights += [weight / len(shown) for _ in shown]
    return tuple(captions), tuple(weights) if len({*weights}) > 1 else ()


def draw_caption(captions: Sequence[str], weights: Sequence[float], rng: np.random.Generator) -> str:
    """Draw one caption, with probabilities proportional to `weights`; without weights each is as likely."""
    if not weights:
        return captions[int(rng.integers(len(captions)))]
    share = np.asarray(weights) / sum(weights)
    return captions[int(rng.choice(len(captions), p=share))]


def split_sentences(text: str) -> list[str]:
    """Split a text after full stops, question and exclamation marks that a word follows; not after abbreviations."""
    sentences: list[str] = []
    for part in (part.strip() for part in _END.split(text)):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {part}"
        elif part:
            sentences.append(part)
    return sentences


def draw_sub_caption(text: str, most: int, rng: np.random.Generator) -> str:
    """Draw 1 to `most` consecutive sentences of a text (FLAIR); a text of one sentence is returned whole.

    The number of sentences is drawn first, then the first sentence; each is uniform. `most` 0 returns the text.
    """
    sentences = split_sentences(text) if most else []
    if len(sentences) < 2:
        return text
    n = int(rng.integers(1, min(most, len(sentences)) + 1))
    first = int(rng.integers(len(sentences) - n + 1))
    return " ".join(sentences[first : first + n])


_SIDE = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)


def change_caption(text: str, rng: np.random.Generator, word_dropout: float, tag_subsets: bool) -> str:
    """Apply `draw_tags`, if `tag_subsets`, and `drop_words`, if `word_dropout` is above 0."""
    text = draw_tags(text, rng) if tag_subsets else text
    return drop_words(text, word_dropout, rng) if word_dropout else text


def drop_words(text: str, probability: float, rng: np.random.Generator) -> str:
    """Leave out each word with `probability`; if none would stay, one drawn at random does."""
    words = text.split()
    is_kept = rng.random(len(words)) >= probability
    if words and not is_kept.any():
        is_kept[rng.integers(len(words))] = True
    return " ".join(word for word, kept in zip(words, is_kept) if kept)


def draw_tags(text: str, rng: np.random.Generator) -> str:
    """Draw 1 to all of the comma-separated parts of a text; the number is uniform, and the order stays."""
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    if len(tags) < 2:
        return text
    n = int(rng.integers(1, len(tags) + 1))
    return ", ".join(tags[k] for k in sorted(rng.permutation(len(tags))[:n]))


def named_sides(texts: Iterable[str]) -> tuple[int, int, str]:
    """Count the texts that say left or right.

    Returns:
        Their number, the number of all, and the first of them, empty without any.
    """
    found, n, first = 0, 0, ""
    for text in texts:
        n += 1
        if _SIDE.search(text):
            found, first = found + 1, first or text
    return found, n, first
