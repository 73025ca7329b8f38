"""Sentences about images as batches; which of them tell left from right."""

import itertools

import pytest
import torch

from mamo.data.record_dataset import RecordSample
from mamo.data.records import ReasoningRecord
from mamo.tasks.reasoning.batch import ReasoningCollator, is_ordered, same_number_of_images
from mamo.world.grammar import Description
from mamo.world.scene import SceneWorld
from mamo.world.statements import KINDS, _Claim
from mamo.world.vocabulary import scenes_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_unordered_sentences_mean_the_same_of_the_images_exchanged(kind: str) -> None:
    """Bug: the head is kept from seeing sides where the truth depends on them."""
    world = SceneWorld("easy", 0)
    claim = _Claim(kind, Description(shape="circle"), Description(colour="red"), 1)
    truths = [
        (claim.is_true(a.objects, b.objects), claim.is_true(b.objects, a.objects))
        for a, b in itertools.combinations([world.scene("test", k) for k in range(12)], 2)
    ]
    if is_ordered(claim.write()):
        assert any(forward != backward for forward, backward in truths)
    else:
        assert all(forward == backward for forward, backward in truths)
    assert is_ordered(claim.write()) == (kind in ("more", "sides"))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The Left image shows a dog.", True), ("the dog on the right-hand side sits", True),
        ("the leftmost cup is red", True), ("The first picture has a cat", True), ("the bright one is lit", False),
        ("There are three cups in total.", False), ("Each image shows a dog.", False),
    ],
)  # fmt: skip
def test_words_for_sides(sentence: str, expected: bool) -> None:
    """Bug: "bright" is read as right, or a capital letter hides a side."""
    assert is_ordered(sentence) is expected


def record(images: list[str], label: bool = True, identifier: str = "dev-1-0-0") -> ReasoningRecord:
    return ReasoningRecord(images=images, sentence="both images show a circle", label=label, identifier=identifier)


def test_collated(tmp_path: object) -> None:
    """Bug: left and right change places, or labels move to other rows."""
    images = torch.arange(2 * 2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 2, 3, 4, 4)
    samples = [RecordSample(record(["a", "b"], k == 1), images[k], 7 + k, ()) for k in range(2)]
    batch = ReasoningCollator(scenes_tokenizer(), 20, 0)([(0, sample) for sample in samples])
    assert torch.equal(batch.image, images)
    assert batch.label.tolist() == [False, True]
    assert batch.sample_id.tolist() == [7, 8]
    assert batch.is_ordered.tolist() == [False, False]
    assert len(batch) == 2
    assert torch.equal(batch.part(1, 2).image, images[1:])


def test_mixed_files_are_refused() -> None:
    """Bug: a crash inside a loader process."""
    with pytest.raises(ValueError, match=r"eval\.jsonl: identifier 7-1 has 1 image\(s\), others 2"):
        same_number_of_images([record(["a", "b"]), record(["a"], identifier="7-1")], "eval.jsonl")
