"""Grounding over records: heat of each expression on its own image, boxes in the pixels of that image."""

from typing import Any

import pytest
import torch

from mamo.data.processor import Processor
from mamo.data.records import GroundingRecord
from mamo.evaluation.scorer import EncodedImages, EncodedTexts
from mamo.tasks.grounding.evaluate import ground_records
from mamo.world.vocabulary import scenes_tokenizer


class Planted:
    """A scorer whose heat is the image's red channel; it counts how many images it was given."""

    def __init__(self) -> None:
        self.n_images = 0
        self.processor = Processor(scenes_tokenizer(), (20, 20), 48)

    def encode_images(self, batches: Any) -> EncodedImages:
        (batch,) = batches
        self.n_images += len(batch)
        return EncodedImages(batch[:, 0].float(), batch)

    def tokenize(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(texts), 3), torch.full((len(texts),), 3)

    def encode_texts(self, ids: torch.Tensor, lengths: torch.Tensor) -> EncodedTexts:
        return EncodedTexts(ids, lengths, ids)

    def gradcam(self, images: EncodedImages, texts: EncodedTexts, rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return images.tokens[rows]


SIZES = {"a": (40, 80), "b": (60, 30)}
GOLD = {"a": (50.0, 8.0, 20.0, 16.0), "b": (3.0, 36.0, 15.0, 18.0)}


def picture(name: str) -> torch.Tensor:
    x, y, w, h = (int(v) for v in GOLD[name])
    image = torch.zeros(3, *SIZES[name], dtype=torch.uint8)
    image[0, y : y + h, x : x + w] = 255
    return image


def record(name: str, key: int, **over: Any) -> GroundingRecord:
    width, height = SIZES[name][1], SIZES[name][0]
    boxes = [(0.0, 0.0, float(width), float(height)), GOLD[name], (0.0, 0.0, 12.0, 12.0)]
    values = {"image": name, "expression_id": key, "expression": "it", "box_xywh": GOLD[name], "proposals_xywh": boxes}
    return GroundingRecord.model_validate({**values, **over})


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_boxes_are_in_pixels_of_images_that_are_not_square(batch_size: int) -> None:
    """Bug: boxes in pixels of the resized image, width and height exchanged, or heat of another record."""
    scorer: Any = Planted()
    records = [record("b", 1), record("a", 2), record("b", 3), record("a", 4, proposals_xywh=[(0.0, 0.0, 9.0, 9.0)])]
    found = ground_records(scorer, records, picture, (20, 20), batch_size)
    assert found["proposal"] == 75
    assert found["upper_bound"] == 75
    assert found["pointing"] == 100
    assert found["random_proposal"] == pytest.approx(25)
    assert scorer.n_images == {1: 4, 2: 2, 5: 2}[batch_size]


def test_without_proposals_the_pointing_game_is_left() -> None:
    """Bug: no number at all, or a crash, for data without detections."""
    scorer: Any = Planted()
    assert ground_records(scorer, [record("a", 1, proposals_xywh=[])], picture, (20, 20), 4) == {"pointing": 100}


def test_bad_boxes_are_named() -> None:
    """Bug: a box of the resized image, or in corners, is scored in silence."""
    scorer: Any = Planted()
    for over, message in (
        ({"box_xywh": None}, r"expression_id 7 \(a\): has no box_xywh"),
        ({"box_xywh": (60.0, 8.0, 40.0, 16.0)}, r"expression_id 7 \(a\): box .* is not inside its image of 80 x 40 px"),
        ({"proposals_xywh": [(0.0, 0.0, 9.0, 90.0)]}, r"expression_id 7 \(a\): box .* is not inside"),
        ({"proposals_xywh": [(0.2, 0.2, 0.3, 0.3)]}, r"expression_id 7 \(a\): .*covers no pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            ground_records(scorer, [record("a", 7, **over)], picture, (20, 20), 4)
