"""The official VQA rules, one case each, worked out by hand from their published description."""

import itertools

import pytest

from mamo.evaluation.metrics.vqa import VqaAnswers, vqa_accuracy, vqa_metrics
from mamo.evaluation.metrics.vqa_answers import normalize_vqa_answer


def ten(**counts: int) -> list[str]:
    """Ten answers: so many of each, filled up with ones that nobody else gives."""
    given = [answer for answer, count in counts.items() for _ in range(count)]
    return [*given, *(f"other {k}" for k in range(10 - len(given)))]


@pytest.mark.parametrize(("matches", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_leave_one_out(matches: int, worth: float) -> None:
    """Would catch min(1, matches / 3) without leaving the annotator out."""
    assert vqa_accuracy("red", ten(red=matches)) == pytest.approx(worth)


def test_the_mean_over_ten_annotators_by_the_plain_definition() -> None:
    """Would catch a wrong closed form, also for more annotators."""
    for n, matches in itertools.product((10, 12), range(13)):
        given = ["red"] * min(matches, n) + [f"x{k}" for k in range(n - min(matches, n))]
        worths = [min(1.0, sum(a == "red" for k, a in enumerate(given) if k != left) / 3) for left in range(n)]
        assert vqa_accuracy("red", given) == pytest.approx(sum(worths) / n)


@pytest.mark.parametrize(
    ("prediction", "given", "worth"),
    [
        ("red", ["red"], 1.0),
        ("red", ["A Red."], 1.0),  # the answer list is normalised, so what it is compared with is too
        ("Red", ["red", "red"], 1.0),
        ("blue", ["red"], 0.0),
        ("red", ["red", "blue"], 1.0),
        ("red", ["red", "blue", "green"], 1.0),
        ("red", ["red", "blue", "green", "grey"], 0.75),
        ("red", ["red", "blue", "green", "grey", "black"], 0.6),  # as each of the five twice among ten
        ("red", ["red", "red", "blue", "green", "grey"], 1.0),
        ("red", ["red"] + ["blue"] * 8, 1 / 3),
    ],
)
def test_fewer_than_ten_answers(prediction: str, given: list[str], worth: float) -> None:
    """Would catch own data with one answer a question scored 0: leaving one out of one leaves nothing to agree with."""
    assert vqa_accuracy(prediction, given) == pytest.approx(worth)


def test_fewer_answers_are_worth_what_they_are_among_ten_people() -> None:
    """Would catch shares of few people on another scale than the official accuracy of the same shares of ten."""
    for n, matches in ((1, 0), (1, 1), (2, 1), (2, 2), (5, 1), (5, 2), (5, 4)):
        given = ["red"] * matches + ["blue"] * (n - matches)
        assert vqa_accuracy("red", given) == pytest.approx(vqa_accuracy("red", given * (10 // n)))


def test_nothing_is_normalised_where_all_agree() -> None:
    """Would catch a scorer that is kinder than the official one."""
    assert vqa_accuracy("Red", ["red"] * 10) == 0
    assert vqa_accuracy("a cat", ["cat"] * 10) == 0
    assert vqa_accuracy(" cat\n", ["cat"] * 10) == 1  # line breaks and spaces around go in any case
    assert vqa_accuracy("A cat.", ["cat"] * 9 + ["dog"]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red  Kite", "red kite"),
        ("two", "2"),
        ("none", "0"),
        ("ten an hour", "10 hour"),
        ("eleven", "eleven"),
        ("isnt", "isn't"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),  # two are missing: not in the table
        ("y'alld've", "y'all'd've"),
        ("maam", "ma'am"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),  # the official table's own slip
        ("lets", "lets"),
        ("shes", "shes"),
        ("Im here", "im here"),  # the table's "Im" never matches lower-cased text
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black /white-grey", "black white grey"),  # each mark is judged alone
        ("1,000", "1000"),
        ("1,000/2", "10002"),  # a comma between digits makes every mark be deleted
        ("yes, it is", "yes it is"),
        ("yes,it is, no", "yesit is no"),  # one mark that touches a space decides for all of its kind
        ("7:30", "7:30"),
        ("cat's", "cat's"),
        ("no.", "no"),
        ("2.5", "2.5"),
        ("2.", "2"),
        ("mr. x", "mr x"),
        ("." * 40, "." * 8),
        ("?", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    """Would catch each rule left out or mended."""
    assert normalize_vqa_answer(text) == expected


def test_metrics_by_answer_type() -> None:
    """Would catch a mean of means, and unrounded percentages."""
    questions = {
        1: VqaAnswers(tuple(ten(yes=10)), "yes/no"),
        2: VqaAnswers(tuple(ten(red=1)), "other"),
        3: VqaAnswers(tuple(ten(blue=2)), "other"),
    }
    found = vqa_metrics({1: "yes", 2: "red", 3: "green"}, questions)
    assert found == {"accuracy": 43.33, "accuracy/yes/no": 100.0, "accuracy/other": 15.0}


def test_what_is_missing_is_told() -> None:
    """Would catch a score over the answered questions alone."""
    questions = {k: VqaAnswers(("a",)) for k in (3, 5, 9)}
    with pytest.raises(ValueError, match="2 questions have no prediction, the first is question_id 5"):
        vqa_metrics({3: "a"}, questions)
    with pytest.raises(ValueError, match="1 predictions are of no question of the split, the first is question_id 7"):
        vqa_metrics({3: "a", 5: "a", 7: "a", 9: "a"}, questions)
