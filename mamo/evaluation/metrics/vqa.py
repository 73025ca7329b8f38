"""VQA accuracy of the official evaluation (Antol et al. 2015; `vqaEval.py`), including its quirks.

Ten people answer each question. The score of an answer is the mean over the ten of min(1, matches among the other nine
/ 3), which is min(1, 3 matches / 10). Where fewer than ten people answered (custom data, often with one answer a
question), the score is min(1, 3 matches / n) and all answers are normalised: a single answer makes a prediction right
or wrong. The training targets of the classification head are the same numbers.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mamo.evaluation.metrics.completeness import check_predictions
from mamo.evaluation.metrics.vqa_answers import normalize_vqa_answer

PEOPLE = 10
"""Number of people who answer a question in VQA v2."""


@dataclass(frozen=True, slots=True)
class VqaAnswers:
    """The answers to one question, ten in VQA v2, and its types in the official annotations."""

    answers: tuple[str, ...]
    answer_type: str = ""
    question_type: str = ""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score `prediction`, from 0 to 1, against the `answers` of people, one or more."""
    prediction, *gold = [_on_one_line(text) for text in (prediction, *answers)]
    if len(gold) < PEOPLE:
        matches = [normalize_vqa_answer(text) for text in gold].count(normalize_vqa_answer(prediction))
        return soft_score(matches, len(gold))
    if len(set(gold)) > 1:  # unanimous answers are not normalised: "A cat" then differs from "a cat"
        prediction, *gold = [normalize_vqa_answer(text) for text in (prediction, *gold)]
    counts = Counter(gold)
    matches = counts[prediction]
    # Leaving out a matching person leaves matches - 1; leaving out another leaves all matches.
    own, other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * own + (len(gold) - matches) * other) / len(gold) if matches else 0.0


def vqa_metrics(predictions: Mapping[int, str], questions: Mapping[int, VqaAnswers]) -> dict[str, float]:
    """Compute `accuracy` and `accuracy/ANSWER_TYPE` in percent, rounded to two places as in the official evaluation.

    Raises ValueError, naming the first, for a question without prediction or a prediction without question.
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
    """Score an answer that `votes` of `people` gave, from 0 to 1; of ten people, VQA v2's official accuracy."""
    return min(1.0, 3 * votes / people)
