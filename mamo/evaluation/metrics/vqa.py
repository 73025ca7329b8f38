"""VQA accuracy by the rules of the official evaluation (Antol et al. 2015; `vqaEval.py`), its quirks included.

Ten people answer each question. An answer is worth the mean over the ten of min(1, matches among the other nine / 3),
which is min(1, 3 matches / 10). That rule asks for four people who agree; where fewer than ten answered (own data,
often with one answer a question) their share counts instead, min(1, 3 matches / n), and all is normalised: of a single
answer everything is right or wrong. The training targets of the classification head are the same numbers.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mamo.evaluation.metrics.completeness import check_predictions
from mamo.evaluation.metrics.vqa_answers import normalize_vqa_answer

PEOPLE = 10
"""Who answer a question in VQA v2."""


@dataclass(frozen=True, slots=True)
class VqaAnswers:
    """The answers to one question, ten in VQA v2, and the types that the official annotations give it."""

    answers: tuple[str, ...]
    answer_type: str = ""
    question_type: str = ""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """What `prediction` is worth, from 0 to 1, where people gave these `answers`, one or more."""
    prediction, *given = [_on_one_line(text) for text in (prediction, *answers)]
    if len(given) < PEOPLE:
        matches = [normalize_vqa_answer(text) for text in given].count(normalize_vqa_answer(prediction))
        return soft_score(matches, len(given))
    if len(set(given)) > 1:  # where all agree nothing is normalised: "A cat" is then not "a cat"
        prediction, *given = [normalize_vqa_answer(text) for text in (prediction, *given)]
    counts = Counter(given)
    matches = counts[prediction]
    # One of the `matches` leaves matches - 1 others, anyone else leaves all of them.
    own, other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * own + (len(given) - matches) * other) / len(given) if matches else 0.0


def vqa_metrics(predictions: Mapping[int, str], questions: Mapping[int, VqaAnswers]) -> dict[str, float]:
    """`accuracy` and `accuracy/ANSWER_TYPE`, in percent rounded to two places as the official evaluation prints them.

    Raises ValueError, naming the first, where a question has no prediction or a prediction no question.
    """
    check_predictions("VQA", "question", predictions, questions, "question_id ")
    values: dict[str, list[float]] = defaultdict(list)
    for question_id, question in questions.items():
        accuracy = vqa_accuracy(predictions[question_id], question.answers)
        values["accuracy"].append(accuracy)
        if question.answer_type:
            values[f"accuracy/{question.answer_type}"].append(accuracy)
    return {name: round(100 * sum(found) / len(found), 2) for name, found in values.items()}


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_score(votes: int, people: int) -> float:
    """What an answer is worth, from 0 to 1, that `votes` of `people` gave: of ten, VQA v2's official accuracy."""
    return min(1.0, 3 * votes / people)
