"""Normalise answers as the official evaluation of VQA does (`vqaEval.py`), including its quirks."""

import re
from collections import Counter

from mamo.data.records import VqaRecord

_PUNCTUATION = r""";/[]"{}()=+\_-><@`,?!"""  # the apostrophe and the colon stay
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
# Meant as "no digit before", but written as a look-ahead for the characters "<=" and a digit: any dot that no digit
# follows goes, "2." included. The official code passes a flag where `re.sub` takes a count, so 32 dots at most go.
_DOT = re.compile(r"\.(?!\d)")
_MOST_DOTS = 32
_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
_ARTICLES = frozenset({"a", "an", "the"})


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:k] + word[k + 1 :] for k, char in enumerate(word) if char == "'"]


def _contractions() -> dict[str, str]:
    """Map words with a missing apostrophe to the right form. Words with a capital I never occur in lower-cased text."""
    endings = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
    }
    once = [stem + ending for ending, stems in endings.items() for stem in stems.split()]
    once += ["ma'am", "o'clock", "'twas", "y'all"]
    twice = [f"{stem}n't've" for stem in ("could", "had", "might", "should", "would")]
    people = ("he", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "y'all", "you")
    twice += [f"{who}'d've" for who in people]
    twice += ["y'all'll", "'ow's'at"]
    table = {wrong: right for right in (*once, *twice) for wrong in _without_one_apostrophe(right)}
    table["somebody'd"] = "somebodyd"  # sic
    return table


_CONTRACTIONS = _contractions()


def normalize_vqa_answer(text: str) -> str:
    """Normalise punctuation, number words, articles and contractions as the official evaluation does."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Remove punctuation.

    A mark that touches a space anywhere in `text` is deleted everywhere, another becomes a space. If any comma is
    between digits, every mark is deleted.
    """
    cleaned, has_comma = text, _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        touches_a_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_a_space or has_comma else " ")
    return _DOT.sub("", cleaned, count=_MOST_DOTS)


def distinct_answers(record: VqaRecord) -> dict[str, int]:
    """Count the normalised answers of a record; empty ones are dropped."""
    normalised = (normalize_vqa_answer(answer) for answer in record.answers)
    return dict(Counter(answer for answer in normalised if answer).most_common())
