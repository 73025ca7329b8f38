"""Answers by ranking, the submission file, and the refusal of overlaps."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mamo.data.records import VqaRecord, write_task_records
from mamo.evaluation.results import facts_of
from mamo.tasks.vqa.evaluate import (
    Answerer,
    AnswerList,
    accuracies,
    answer_all,
    majority_accuracy,
    rank_answers,
    refuse_overlap,
    write_submission,
)
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder
from mamo.tasks.vqa.network import VqaNetwork
from mamo.tasks.vqa.task import VqaTask
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of, make_backbone, predictor_of, spread_weights

TOKENIZER = scenes_tokenizer()
ANSWERS = ["red", "yes", "no", "small", "small red circle", "small blue circle", "3", "yellow square", "yellow"]
CPU = torch.device("cpu")
PHRASES = ["small red circle", "small blue circle", "large red", "large blue", "yellow square", "two red", "two blue"]


def network(head: str = "decoder") -> VqaNetwork:
    backbone = make_backbone(width=32)
    fusion = backbone.fusion
    made = AnswerDecoder(fusion, backbone.text_encoder) if head == "decoder" else AnswerClassifier(32, len(ANSWERS))
    spread_weights(fusion, made, std=0.4)
    return VqaNetwork(backbone, made).eval()


@torch.inference_mode()
def test_the_whole_list_ranked_equals_brute_force() -> None:
    """Bug: padding, a shared first token or the order of the shortlist changes what an answer is worth."""
    whole = network()
    head = whole.answer
    assert isinstance(head, AnswerDecoder)
    torch.manual_seed(1)
    memory, is_valid = torch.randn(40, 9, 32), torch.arange(9) < torch.randint(3, 10, (40, 1))
    of, embed = AnswerList.of(PHRASES, TOKENIZER, CPU), whole.backbone.text_encoder.embed
    likelihood = torch.zeros(40, len(PHRASES))
    for question in range(40):
        for row, answer in enumerate(PHRASES):
            ids = TOKENIZER(answer)["input_ids"]
            for t in range(1, len(ids)):  # token by token, nothing batched, nothing padded
                so_far = torch.tensor([[ids[:t]]])
                part = slice(question, question + 1)
                logits = head(embed(so_far), memory[part, is_valid[question]], is_valid[part, is_valid[question]])
                likelihood[question, row] += logits[0, 0, -1].log_softmax(dim=-1)[ids[t]]
    expected = likelihood.argmax(dim=1)
    assert len(set(expected.tolist())) > 1
    assert torch.equal(rank_answers(head, embed, memory, is_valid, of, len(PHRASES)), expected)
    first = torch.tensor([TOKENIZER(answer)["input_ids"][1] for answer in PHRASES])
    start = embed(torch.tensor([[[TOKENIZER.cls_token_id]]]).expand(40, 1, 1))
    likeliest_word = first[head(start, memory, is_valid)[:, 0, 0][:, first].argmax(dim=1)]
    short = rank_answers(head, embed, memory, is_valid, of, 1)
    assert torch.equal(first[short], likeliest_word)  # a shortlist of one is the first token's


def records(n: int = 5) -> list[VqaRecord]:
    shared = {"question": "is there a red circle?", "answers": ["yes"] * 10, "answer_type": "yes/no"}
    return [VqaRecord(image=str(k // 2), question_id=k, **shared) for k in range(n)]


def picture(name: str) -> torch.Tensor:
    return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(name)))


@pytest.mark.parametrize("head", ["decoder", "classifier"])
def test_answers_do_not_depend_on_batches_and_blank_images_tell_nothing(head: str) -> None:
    """Bug: answers go to other questions, an image to another question, or the prior still sees the image."""
    answerer = Answerer(predictor_of(network(head), text_max_tokens=20), ANSWERS, 4)
    seen: list[torch.Tensor] = []
    answerer.network.backbone.image_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        alone = answer_all(answerer, records(), picture, (16, 16), 1)
        assert answer_all(answerer, records()[::-1], picture, (16, 16), 3) == alone
        assert all(pixels.any() for pixels in seen)
        seen.clear()
        blank = answer_all(answerer, records(), picture, (16, 16), 2, is_blank=True)
    assert alone.keys() == {0, 1, 2, 3, 4}
    assert len(set(blank.values())) == 1
    assert seen
    assert not any(pixels.any() for pixels in seen)  # the mean colour
    assert accuracies(dict.fromkeys(range(5), "yes"), records()) == {"accuracy": 100.0, "accuracy/yes/no": 100.0}
    assert accuracies(alone, [r.model_copy(update={"answers": []}) for r in records()]) == {}


def test_submission(tmp_path: Path) -> None:
    """Bug: a file that the server refuses after the upload: incomplete, of another split, with unknown answers."""
    file = tmp_path / "results.json"
    for given, message in (
        ({0: "yes", 2: "no"}, "results.json: 1 questions have no answer, the first is question_id 1"),
        (
            {0: "yes", 1: "no", 2: "no", 9: "no"},
            "1 answers are to no question of the split, the first is question_id 9",
        ),
        ({0: "yes", 1: "maybe", 2: "no"}, "1 answers are not on the answer list, the first is question_id 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_submission(file, given, records(3), ANSWERS)
        assert not file.exists()
    write_submission(file, {2: "no", 0: "yes", 1: "3"}, records(3), ANSWERS)
    rows = [{"question_id": k, "answer": answer} for k, answer in enumerate(("yes", "3", "no"))]
    assert json.loads(file.read_text()) == rows


def test_the_majority_is_the_best_single_answer() -> None:
    """Bug: an accuracy of 42 without a comparison, where one answer to all questions is worth 46."""
    asked = [["yes"] * 10, ["no"] * 10, ["yes"] * 3 + ["red"] * 7, ["blue"] * 10, ["blue"] * 10, ["blue"] * 10, []]
    questions = [
        VqaRecord(image=str(k), question_id=k, question="what?", answers=answers) for k, answers in enumerate(asked)
    ]
    of_each = {
        answer: accuracies(dict.fromkeys(range(len(asked)), answer), questions)["accuracy"] for answer in ANSWERS
    }
    assert (
        majority_accuracy(questions, ANSWERS) == max(of_each.values()) == of_each["yes"] < 50
    )  # "blue" is off the list


def test_overlap_is_refused() -> None:
    """Bug: a validation accuracy on questions, or images, that were trained on."""
    train, other = records(2), VqaRecord(image="7", question_id=70, question="what?")
    refuse_overlap(train, [other], "val.jsonl")
    with pytest.raises(ValueError, match=r"val\.jsonl: 1 questions are in .*question_id 1 \(0\)"):
        refuse_overlap(train, [other, records(2)[1]], "val.jsonl")
    with pytest.raises(ValueError, match=r"1 questions are about images that are in .*question_id 71 \(0\)"):
        refuse_overlap(train, [other, other.model_copy(update={"image": "0", "question_id": 71})], "val.jsonl")


@pytest.mark.parametrize("spelling", ["../data/0.png", "./0.png", "link.png", "folder/0.png", "missing/../0.png"])
def test_an_image_is_the_same_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    """Bug: a training image that is written as `../data/0.png`, or reached by a link, counts as held out."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").touch()
    (data / "link.png").symlink_to("0.png")
    (data / "folder").symlink_to(data)
    train, other = (
        VqaRecord(image=str(data / name), question_id=k, question="what?") for k, name in enumerate(("0.png", spelling))
    )
    for seen, asked in ((train, other), (other, train)):
        with pytest.raises(ValueError, match=f"1 questions are about images .*question_id {asked.question_id}"):
            refuse_overlap([seen], [asked], "val.jsonl")


def test_shared_images_are_allowed_and_recorded(tmp_path: Path) -> None:
    """Bug: VQA-RAD and VQA-CP, whose splits share images, cannot be evaluated; or the results do not say so."""
    train, other = records(2), VqaRecord(image="7", question_id=70, question="what?")
    about_training = other.model_copy(update={"image": "0", "question_id": 71})
    with pytest.raises(ValueError, match=r"question_id 71 \(0\); allow it with vqa\.shared_images=true"):
        refuse_overlap(train, [other, about_training], "val.jsonl")
    assert refuse_overlap(train, [other, about_training, other, other], "val.jsonl", shared_images=True) == 25.0
    with pytest.raises(ValueError, match=r"val\.jsonl: 1 questions are in the training data too"):
        refuse_overlap(train, [records(2)[1]], "val.jsonl", shared_images=True)
    for name, rows in (("train", train), ("eval", [other, about_training])):
        write_task_records(tmp_path / f"{name}.jsonl", rows)
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    data = {"source": "records", **files, "tokenizer": "scenes"}
    for shared, expected in ((True, {"shared_images": 50.0}), (False, None)):
        config = config_of("vqa", data=data, vqa={"shared_images": shared})
        task = VqaTask.__new__(VqaTask)
        task.config, task.answers = config, ANSWERS
        if expected is None:
            with pytest.raises(ValueError, match=r"allow it with vqa\.shared_images=true"):
                task.check_held_out(config.data.train_files)
        else:
            task.check_held_out(config.data.train_files)
            with patch("mamo.tasks.vqa.task.evaluate_vqa", return_value={"vqa/accuracy": 1.0}):
                assert facts_of(task.evaluate(None, tmp_path)) == expected
