"""Evaluate grounding: heat maps of expressions against their boxes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import LoadImage, load_unique_images
from mamo.data.records import GroundingRecord, boxes_outside
from mamo.data.transforms import eval_transform
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.grounding import grounding_scores, mean_percent, to_image_size, to_image_size_bicubic
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.scorer import HeatFrom, Scorer, eval_mode, heatmaps
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.sources import load_records


def ground_records(
    scorer: Scorer,
    records: Sequence[GroundingRecord],
    load_image: LoadImage,
    image_size_px: tuple[int, int],
    batch_size: int,
    heat_from: HeatFrom = "fusion",
    resize: Callable[[Tensor, tuple[int, int]], NDArray[np.float64]] = to_image_size,
) -> dict[str, float]:
    """Compute `grounding_metrics` of the records, a batch at a time; boxes are in pixels of each image's own size.

    `resize` brings heat to that size. Several processes share the work.

    Raises ValueError, naming the record, for one without a gold box, and for a box that leaves its image.
    """
    ordered = sorted(records, key=lambda record: record.image)  # an image is read and encoded about once

    def locate(start: int) -> list[dict[str, float]]:
        part = ordered[start : start + batch_size]
        raw, row = load_unique_images(part, load_image, None)
        resized = torch.stack([eval_transform(image, image_size_px) for image in raw])
        texts = scorer.encode_texts(*scorer.tokenize([clean_caption(record.expression) for record in part]))
        rows = torch.tensor([row[record.image] for record in part])
        heats = heatmaps(scorer, resized, texts, rows, torch.arange(len(part)), heat_from)
        found = []
        for record, heat in zip(part, heats, strict=True):
            height, width = raw[row[record.image]].shape[1:]
            gold = _checked(record, width, height)
            try:
                found.append(grounding_scores(resize(heat, (height, width)), record.proposals_xywh, gold))
            except ValueError as error:
                raise ValueError(f"expression_id {record.expression_id} ({record.image}): {error}") from None
        return found

    return mean_percent([one for found in map_over_ranks(locate, range(0, len(ordered), batch_size)) for one in found])


def _checked(record: GroundingRecord, width: int, height: int) -> tuple[float, float, float, float]:
    if record.box_xywh is None:
        raise ValueError(
            f"expression_id {record.expression_id} ({record.image}): has no box_xywh, the truth to score by"
        )
    for problem in boxes_outside(record, width, height):
        raise ValueError(problem)
    return record.box_xywh


def evaluate_grounding(config: GroundingConfig, predictor: Predictor) -> dict[str, float]:
    """Compute `grounding/` metrics in percent of the test expressions or of `data.eval_file`."""
    data, evaluation = config.data, config.evaluation
    records, load_image = load_records(data, GroundingRecord, "test", evaluation.probe_items)
    with eval_mode(predictor.network):
        scorer = Scorer(predictor, evaluation.batch_size)
        resize = to_image_size if data.source == "scenes" else to_image_size_bicubic
        found = ground_records(
            scorer, records, load_image, data.image_size, evaluation.batch_size, evaluation.grounding_heat, resize
        )
    return {f"grounding/{name}": value for name, value in found.items()}
