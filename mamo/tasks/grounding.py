"""Weakly-supervised grounding: ITC and ITM on images and expressions without boxes; Grad-CAM tells where (ALBEF)."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mamo.config import Config
from mamo.data.pairs import Sample, hash_id
from mamo.data.records import clean_caption
from mamo.data.task_records import GroundingRecord
from mamo.data.task_sources import TaskSource, records_of
from mamo.evaluation.locating import locate_all
from mamo.evaluation.scoring import Scorer, evaluating
from mamo.tasks.build import build_collator, build_network
from mamo.tasks.parts import Parts, Trained
from mamo.tasks.pretrain import PretrainTask


class ExpressionPairs:
    """Grounding records as image-text pairs: their boxes are not looked at."""

    def __init__(self, source: TaskSource[GroundingRecord]) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> Any:
        """Images and expressions."""
        for record in self.source.records:
            yield f"{record.image}\t{record.expression}\n"

    def data_sets(self) -> list[str]:
        """As the records'."""
        return self.source.data_sets()

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """The image and the expression of record `index`; expressions of one image are never negatives of it."""
        found = self.source.load(index, rng)
        text = clean_caption(found.record.expression)
        image_id = hash_id(found.record.image)
        return Sample(found.images[0], text, image_id, hash_id(text.lower()), found.sample_id, found.skipped)


def grounding_parts(config: Config, tokenizer: Any, stored: Path | None) -> Parts:
    """Images and expressions in; the share of expressions whose object is found out."""
    network = build_network(config, len(tokenizer), tokenizer.pad_token_id)
    encoder = network.backbone.image_encoder

    def source() -> ExpressionPairs:
        records, load_image = records_of(config.data, GroundingRecord, "train", config.data.train_scenes)
        return ExpressionPairs(TaskSource(records, load_image, config.data))

    return Parts(
        network=network,
        image_encoder=encoder,
        source=source,
        collator=build_collator(config, tokenizer, encoder.grid),
        task=functools.partial(PretrainTask, config, network),
        evaluate=functools.partial(evaluate_grounding, config),
        baselines=lambda batch: {},
    )


def evaluate_grounding(config: Config, trained: Trained, folder: Path) -> dict[str, float]:
    """`grounding/` metrics in percent of the test expressions or of `data.eval_file`."""
    data, batch_size = config.data, config.evaluation.batch_size
    records, load_image = records_of(data, GroundingRecord, "test", config.evaluation.probe_items)
    reading = (trained.tokenizer, trained.normalise, trained.device, data.text_max_tokens)
    with evaluating(trained.network):
        scorer = Scorer(trained.network, *reading, batch_size)
        found = locate_all(scorer, records, load_image, data.image_size, batch_size)
    return {f"grounding/{name}": value for name, value in found.items()}
