"""Evaluate grounding: heat maps of expressions against their boxes."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mamo.config.schema import RunConfig
from mamo.data.images import BadSamplePolicy
from mamo.data.judge import grounding_problems, raise_problems, row_problems
from mamo.data.record_dataset import LoadImage, load_unique_images, readable
from mamo.data.records import Box, GroundingRecord
from mamo.data.transforms import eval_transform
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.grounding import (
    grounding_scores,
    mean_percent,
    to_image_size,
    to_image_size_albef,
    to_image_size_bicubic,
)
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics, facts_of
from mamo.evaluation.scorer import HeatFrom, Scorer, eval_mode, heatmaps
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.sources import bad_sample_policy, load_records, require_some

Resize = Callable[[Tensor, tuple[int, int]], NDArray[np.float64]]
"""(heat [h, w], height and width in pixels) -> heat [H, W]."""
RESIZE: Mapping[str, Resize] = {"cut": to_image_size_bicubic, "uncut": to_image_size_albef}
"""By `evaluation.heat_resize`."""


def resize_of(config: RunConfig) -> Resize:
    """Return how heat is brought to the size of an image: as `evaluation.heat_resize` says, bilinearly on scenes."""
    return to_image_size if config.data.source == "scenes" else RESIZE[config.evaluation.heat_resize]


def ground_records(
    scorer: Scorer,
    records: Sequence[GroundingRecord],
    load_image: LoadImage,
    image_size_px: tuple[int, int],
    batch_size: int,
    heat_from: HeatFrom = "fusion",
    policy: BadSamplePolicy | None = None,
    resize: Resize = to_image_size,
) -> Metrics:
    """Compute `grounding_metrics` of the records, a batch at a time; boxes are in pixels of each image's own size.

    `resize` brings heat to that size. Several processes share the work. `policy` counts the images that cannot be read
    (`load_unique_images`). Facts are the numbers of expressions and of those that were skipped.

    Raises ValueError, naming the record, for one without a gold box, and for a box that leaves its image.
    """
    ordered = sorted(records, key=lambda record: record.image)  # an image is read and encoded about once

    def locate(start: int) -> list[dict[str, float]]:
        part = ordered[start : start + batch_size]
        raw, row = load_unique_images(part, load_image, None, policy)
        part = readable(part, row)
        if not part:
            return []
        resized = torch.stack([eval_transform(image, image_size_px, scorer.processor.resizing) for image in raw])
        clean = scorer.processor.clean
        texts = scorer.encode_texts(*scorer.tokenize([clean(record.expression) for record in part]))
        rows = torch.tensor([row[record.image] for record in part])
        heats = heatmaps(scorer, resized, texts, rows, torch.arange(len(part)), heat_from)
        found = []
        for record, heat in zip(part, heats, strict=True):
            height, width = raw[row[record.image]].shape[1:]
            gold = _checked(record, width, height)
            found.append(grounding_scores(resize(heat, (height, width)), record.proposals_xywh, gold))
        return found

    scores = [one for found in map_over_ranks(locate, range(0, len(ordered), batch_size)) for one in found]
    require_some(scores)
    return Metrics(mean_percent(scores), {"expressions": len(scores), "skipped": len(records) - len(scores)})


def _checked(record: GroundingRecord, width: int, height: int) -> Box:
    for problem in (*row_problems([record]), *grounding_problems(record, width, height)):
        raise ValueError(problem)
    assert record.box_xywh is not None
    return record.box_xywh


def evaluate_grounding(config: GroundingConfig, predictor: Predictor) -> Metrics:
    """Compute `grounding/` metrics in percent of the test expressions or of `data.eval_file`."""
    data, evaluation = config.data, config.evaluation
    records, load_image = load_records(data, GroundingRecord, "test", evaluation.probe_items)
    raise_problems(data.eval_path, row_problems(records))
    with eval_mode(predictor.network):
        scorer = Scorer(predictor, evaluation.batch_size, evaluation.itm_score)
        found = ground_records(
            scorer,
            records,
            load_image,
            data.image_size,
            evaluation.batch_size,
            evaluation.grounding_heat,
            bad_sample_policy(data),
            resize_of(config),
        )
    return Metrics({f"grounding/{name}": value for name, value in found.items()}, facts_of(found))
