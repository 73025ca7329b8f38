"""Where a network sees what expressions mean: Grad-CAM heat of records, against their boxes."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamo.data.records import clean_caption
from mamo.data.task_records import GroundingRecord, boxes_outside
from mamo.data.task_sources import LoadImage, load_distinct
from mamo.data.transforms import eval_transform
from mamo.distributed import share
from mamo.evaluation.grounding import grounded, percentages, to_image_size
from mamo.evaluation.scoring import EncodedTexts, Scorer
from mamo.explain import image_grad_cam, occlusion

HeatFrom = Literal["fusion", "image_encoder", "occlusion"]
"""Where heat is read: `grad_cam`, `image_grad_cam` or `occlusion` of `mamo.explain`."""


def locate_all(
    scorer: Scorer,
    records: Sequence[GroundingRecord],
    load_image: LoadImage,
    image_size_px: tuple[int, int],
    batch_size: int,
    heat_from: HeatFrom = "fusion",
    resize: Callable[[Tensor, tuple[int, int]], NDArray[np.float64]] = to_image_size,
) -> dict[str, float]:
    """`grounding_metrics` of the records, a batch of them at a time; boxes are in pixels of each image's own size.

    `resize` brings heat to that size. Several processes share the work.

    Raises ValueError, naming the record, for one without a gold box, and for a box that leaves its image.
    """
    ordered = sorted(records, key=lambda record: record.image)  # an image is read and encoded about once

    def locate(start: int) -> list[dict[str, float]]:
        part = ordered[start : start + batch_size]
        raw, row = load_distinct(part, load_image, None)
        resized = torch.stack([eval_transform(image, image_size_px) for image in raw])
        texts = scorer.encode_texts(*scorer.tokenize([clean_caption(record.expression) for record in part]))
        rows = torch.tensor([row[record.image] for record in part])
        heats = heats_of(scorer, resized, texts, rows, torch.arange(len(part)), heat_from)
        found = []
        for record, heat in zip(part, heats, strict=True):
            height, width = raw[row[record.image]].shape[1:]
            gold = _checked(record, width, height)
            try:
                found.append(grounded(resize(heat, (height, width)), record.proposals_xywh, gold))
            except ValueError as error:
                raise ValueError(f"expression_id {record.expression_id} ({record.image}): {error}") from None
        return found

    return percentages([one for found in share(locate, range(0, len(ordered), batch_size)) for one in found])


def heats_of(
    scorer: Scorer, images: Tensor, texts: EncodedTexts, image_rows: Tensor, text_rows: Tensor, heat_from: HeatFrom
) -> Tensor:
    """Heat float32 [N, h, w] of pairs of rows int64 [N] of images uint8 [I, 3, H, W] and of texts."""
    if heat_from == "fusion":
        return scorer.ground(scorer.encode_images([images]), texts, image_rows, text_rows)
    how = image_grad_cam if heat_from == "image_encoder" else occlusion
    return scorer.ground_pixels(how, images, texts, image_rows, text_rows)


def _checked(record: GroundingRecord, width: int, height: int) -> tuple[float, float, float, float]:
    if record.box_xywh is None:
        raise ValueError(
            f"expression_id {record.expression_id} ({record.image}): has no box_xywh, the truth to score by"
        )
    for problem in boxes_outside(record, width, height):
        raise ValueError(problem)
    return record.box_xywh
