"""VQA accuracy by the rules of the official evaluation (Antol et al. 2015; `vqaEval.py`), its quirks included.

Ten people answer each question. An answer is worth the mean over the ten of min(1, matches among the other nine / 3).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mamo.evaluation.answered import check_answered

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
    """Words with a missing apostrophe -> the right form. Words with a capital I never occur in lower-cased text."""
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


@dataclass(frozen=True, slots=True)
class VqaAnswers:
    """The ten answers to one question, and the types that the official annotations give it."""

    answers: tuple[str, ...]
    answer_type: str = ""
    question_type: str = ""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """What `prediction` is worth, from 0 to 1, where people gave these `answers` (ten in VQA v2)."""
    prediction, *given = [_on_one_line(text) for text in (prediction, *answers)]
    if len(set(given)) > 1:  # where all agree nothing is normalised: "A cat" is then not "a cat"
        prediction, *given = [normalise_answer(text) for text in (prediction, *given)]
    counts = Counter(given)
    matches = counts[prediction]
    # One of the `matches` leaves matches - 1 others, anyone else leaves all of them.
    own, other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * own + (len(given) - matches) * other) / len(given) if matches else 0.0


def normalise_answer(text: str) -> str:
    """Punctuation, number words, articles and contractions as the official evaluation treats them."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_metrics(predictions: Mapping[int, str], questions: Mapping[int, VqaAnswers]) -> dict[str, float]:
    """`accuracy` and `accuracy/ANSWER_TYPE`, in percent rounded to two places as the official evaluation prints them.

    Raises ValueError, naming the first, where a question has no prediction or a prediction no question.
    """
    check_answered("VQA", "question", predictions, questions, "question_id ")
    values: dict[str, list[float]] = defaultdict(list)
    for question_id, question in questions.items():
        accuracy = vqa_accuracy(predictions[question_id], question.answers)
        values["accuracy"].append(accuracy)
        if question.answer_type:
            values[f"accuracy/{question.answer_type}"].append(accuracy)
    return {name: round(100 * sum(found) / len(found), 2) for name, found in values.items()}


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark that touches a space anywhere in `text` is deleted everywhere, another becomes a space.

    One comma between digits anywhere makes every mark be deleted.
    """
    cleaned, has_comma = text, _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        touches_a_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_a_space or has_comma else " ")
    return _DOT.sub("", cleaned, count=_MOST_DOTS)
