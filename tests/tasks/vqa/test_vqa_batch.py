"""The answer list, the weights of answers, and VQA batches."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mamo.data.record_dataset import RecordSample
from mamo.data.records import VqaRecord
from mamo.evaluation.metrics.vqa_answers import distinct_answers
from mamo.tasks.registry import build_task
from mamo.tasks.vqa.batch import VqaCollator, answer_list, log_odds
from mamo.tasks.vqa.heads import AnswerClassifier
from mamo.tasks.vqa.losses import classifier_loss, decoder_loss, list_scores
from mamo.tasks.vqa.task import VqaTask
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of


def asked(*answers: str, key: int = 1) -> VqaRecord:
    return VqaRecord(image="a.png", question_id=key, question="what?", answers=list(answers))


def test_the_list_holds_the_commonest_answers() -> None:
    """Bug: slips of single people get on the list, spellings count apart, or the order depends on the run."""
    records = [
        asked("Red.", "red", "the red", "blue", key=1), asked("red", "red", "blue", key=2),
        asked("Two", "2", "3", key=3), asked("green", "blue", "blue", key=4),
    ]  # fmt: skip
    assert answer_list(records, 1) == ["red", "2", "blue"]
    assert answer_list(records, 2) == ["red"]
    assert distinct_answers(records[0]) == {"red": 3, "blue": 1}
    with pytest.raises(ValueError, match=r"vqa\.answer_min_count: no answer is the commonest one to 3"):
        answer_list(records, 3)


def test_answers_of_one_person_are_not_listed_beside_those_of_ten() -> None:
    """Bug: Visual Genome's free answers enter the list of VQA; or a data set of single answers has no list."""
    vqa = [asked(*["red"] * 6, *["dark red"] * 4, key=k) for k in range(9)]
    genome = [asked("on wall", key=100 + k) for k in range(9)]
    assert answer_list([*vqa, *genome], 9) == ["red"]
    assert answer_list(genome, 9) == ["on wall"]
    few = [asked("red", "red", "blue", key=1), asked("green", key=2)]
    assert answer_list(few, 1) == ["green", "red"]
    chosen = [record.model_copy(update={"multiple_choice_answer": "Dark red."}) for record in vqa]
    assert answer_list([*chosen, *genome], 9) == ["dark red"]
    blank = [record.model_copy(update={"multiple_choice_answer": "."}) for record in vqa]
    assert answer_list(blank, 9) == ["red"]


def batch_of(*records: VqaRecord, answers: tuple[str, ...] = ("yes", "no", "red")):
    samples = [
        RecordSample(record, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), k, ()) for k, record in enumerate(records)
    ]
    return VqaCollator(scenes_tokenizer(), 20, answers, 0)([(0, sample) for sample in samples])


def test_weights_and_scores() -> None:
    """Bug: weights by the list instead of the people, a single person's answer as sure as ten, scores over 1."""
    batch = batch_of(asked(*["yes"] * 7, *["no"] * 2, "maybe"), asked("red"), asked(), asked("Yes", "no"))
    expected = [[0.7, 0.2, 0.1], [0.5, 0, 0], [0, 0, 0], [0.5, 0.5, 0]]
    torch.testing.assert_close(batch.answer_weight, torch.tensor(expected))
    assert batch.answer_row.tolist() == [[0, 1, -1], [2, -1, -1], [-1, -1, -1], [0, 1, -1]]
    torch.testing.assert_close(
        batch.answer_score, torch.tensor([[1.0, 0.6, 0.3], [1.0, 0, 0], [0, 0, 0], [1.0, 1.0, 0]])
    )
    tokenizer = scenes_tokenizer()
    for b, k, text in ((0, 0, "yes"), (0, 2, "maybe"), (1, 0, "red"), (3, 1, "no")):
        ids = batch.answer_ids[b, k][batch.answer_is_valid[b, k]].tolist()
        assert ids == tokenizer(text)["input_ids"]
    assert not batch.answer_is_valid[2].any()
    assert torch.equal(batch.part(1, 2).answer_ids, batch.answer_ids[1:2])


def test_losses_by_plain_loops() -> None:
    """Bug: an answer that is not on the list trains one that is; the mean instead of the sum over the list."""
    batch = batch_of(asked(*["yes"] * 7, *["no"] * 2, "maybe"), asked("red"))
    score = list_scores(batch.answer_row, batch.answer_score, 3)
    torch.testing.assert_close(score, torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.0, 1.0]]))
    logits = torch.randn(2, 3)
    told = 0.0
    for s, x in zip(score.flatten(), logits.flatten()):
        told -= float(s * functional.logsigmoid(x) + (1 - s) * functional.logsigmoid(-x))
    assert float(classifier_loss(logits, score, 2)) == pytest.approx(told / 2, rel=1e-5)
    likelihood = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -9.0, -9.0]])
    assert float(decoder_loss(likelihood, batch.answer_weight, 2)) == pytest.approx((0.7 + 0.4 + 0.3 + 2.0) / 2)


def test_the_biases_of_the_classifier_are_the_log_odds_of_the_answers() -> None:
    """Bug: under a summed cross-entropy the first hundred steps learn how rare answers are."""
    records = [
        asked("yes", key=1),
        asked("no", "no", "yes", key=2),
        asked("yes", key=3),
        asked(key=4),
        asked("3", key=5),
    ]
    found = log_odds(records, ["yes", "no", "red"])
    share = torch.tensor([3 / 5, 1 / 5, 0.5 / 5])  # an answer that nobody gave is not impossible
    torch.testing.assert_close(found, share.logit())
    batch = batch_of(*records)
    score = list_scores(batch.answer_row, batch.answer_score, 3)

    def loss(logits: torch.Tensor) -> float:
        return float(classifier_loss(logits.expand(5, -1), score, 5))

    assert all(loss(found) < loss(found + step * torch.eye(3)[row]) for step in (-0.3, 0.3) for row in (0, 1))
    assert torch.isfinite(log_odds([asked("yes")], ["yes"])).all()


def test_a_new_classifier_starts_there_and_a_stored_one_keeps_its_own(tmp_path: Path) -> None:
    """Bug: the biases start at 0, or a resumed run's are overwritten."""
    config = config_of("vqa", vqa={"head": "classifier", "answer_min_count": 1}, data={"train_scenes": 40})
    task = build_task(config, scenes_tokenizer())
    assert isinstance(task, VqaTask)
    expected = log_odds(task.training_records[0], task.answers)
    head = task.network.answer
    assert isinstance(head, AnswerClassifier)
    assert torch.equal(head.classifier.bias.data, expected)
    assert expected.mean() < -1
    (tmp_path / "answers.json").write_text(task.assets["answers.json"])
    again = build_task(config, scenes_tokenizer(), tmp_path)
    assert not again.network.answer.classifier.bias.any()  # until the weights are loaded
