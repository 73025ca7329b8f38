"""Weakly-supervised grounding: ITC and ITM on images and expressions without boxes; Grad-CAM tells where (ALBEF)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mamo.data.collate import tokenize
from mamo.data.pairs import Sample, hash_id
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import RecordDataset
from mamo.data.records import GroundingRecord
from mamo.evaluation.metrics.grounding import to_image_size, to_image_size_bicubic
from mamo.evaluation.scorer import Scorer, eval_mode
from mamo.losses.itm import itm_loss
from mamo.models.build import build_network
from mamo.tasks.base import Parts, Trained, pictures_of
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.grounding.evaluate import ground_records
from mamo.tasks.pretrain.batch import PairBatch, PairCollator, pair_collator
from mamo.tasks.pretrain.targets import Targets
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.sources import check_records, load_records, record_dataset


class ExpressionPairs:
    """Grounding records as image-text pairs: their boxes are not looked at."""

    group_size = 1

    def __init__(self, source: RecordDataset[GroundingRecord]) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> Any:
        """Images and expressions."""
        for record in self.source.relocated_records():
            yield f"{record.image}\t{record.expression}\t{record.foil}\n"

    def dataset_names(self) -> list[str]:
        """As the records'."""
        return self.source.dataset_names()

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """The image and the expression of record `index`; expressions of one image are never negatives of it."""
        found = self.source.load(index, rng)
        text, foil = clean_caption(found.record.expression), clean_caption(found.record.foil)
        image_id = hash_id(found.record.image)
        ids = (image_id, hash_id(text.lower()), found.sample_id)
        return ExpressionSample(found.images[0], text, *ids, found.skipped, foil)


@dataclass(frozen=True, slots=True)
class ExpressionSample(Sample):
    """`foil` is true of nothing in the image; empty where none is known."""

    foil: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpressionBatch(PairBatch):
    """Images, expressions and their foils."""

    foil_input_ids: Tensor
    """int64 [B, L]."""
    foil_is_valid: Tensor
    """bool [B, L], False at padding."""


class FoilCollator(PairCollator):
    """Pairs with their foils; runs in the loader's worker."""

    def __call__(self, drawn: Sequence[tuple[int, Sample]]) -> ExpressionBatch:
        """Collate (epoch, sample) pairs."""
        pairs = super().__call__(drawn)
        foils = [sample.foil for _, sample in drawn if isinstance(sample, ExpressionSample)]
        ids, is_valid = tokenize(self.tokenizer, foils, self.text_max_tokens)
        return ExpressionBatch(**pairs.tensors(), skipped=pairs.skipped, foil_input_ids=ids, foil_is_valid=is_valid)


class FoilTask(PretrainTask):
    """Pre-training's losses with another ITM: each image with its expression and with its foil.

    A short expression ("a red circle") is true of many images. Negatives drawn from other samples are then often true,
    and the more often the harder they are; against them ITM stays at its class prior, and Grad-CAM shows nothing. A
    foil is false for certain, and differs from the truth by one word about one object.
    """

    def itm(
        self,
        image_feature: Tensor,
        text_feature: Tensor,
        embedded: Tensor,
        text: Tensor,
        batch: PairBatch,
        targets: Targets,
    ) -> tuple[Tensor, Tensor]:
        """Two fusions a sample, one match and one mismatch."""
        assert isinstance(batch, ExpressionBatch)
        assert self.network.itm is not None
        fusion, n = self.network.backbone.fusion, len(batch)
        foil = self.network.backbone.text_encoder(batch.foil_input_ids, batch.foil_is_valid)
        longest = max(text.shape[1], foil.shape[1])
        both = torch.cat([functional.pad(value, (0, 0, 0, longest - value.shape[1])) for value in (text, foil)])
        valid = (batch.is_valid, batch.foil_is_valid)
        is_valid = torch.cat([functional.pad(value, (0, longest - value.shape[1])) for value in valid])
        read = fusion.text_positions(torch.zeros(2 * n, 1, dtype=torch.int64, device=text.device))  # [CLS]
        logits = self.network.itm(fusion(torch.cat([embedded, embedded]), both, is_valid, read=read)[:, 0])
        is_match = torch.arange(2 * n, device=text.device) < n
        n_global = 2 * targets.n_samples
        hits = (logits.argmax(dim=1) == is_match.long()).sum() / n_global
        return itm_loss(logits, is_match, torch.ones_like(is_match), n_global), hits


def grounding_parts(config: GroundingConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """Images and expressions in; the share of expressions whose object is found out."""
    network = build_network(config, len(tokenizer), tokenizer.pad_token_id)
    encoder = network.backbone.image_encoder
    has_foils = config.losses.itm_negatives == "foils"

    def source() -> ExpressionPairs:
        records, load_image = load_records(config.data, GroundingRecord, "train", config.data.train_scenes)
        lacking = [record for record in records if has_foils and not record.foil]
        if lacking:
            raise ValueError(
                f"data.train_file: expression_id {lacking[0].expression_id} ({lacking[0].image}) has no foil; "
                "add one to every record, or use losses.itm_negatives: pool"
            )
        return ExpressionPairs(record_dataset(records, load_image, config.data))

    return Parts(
        network=network,
        image_encoder=encoder,
        source=source,
        collator=pair_collator(config, tokenizer, encoder.grid, FoilCollator if has_foils else PairCollator),
        task=functools.partial(FoilTask if has_foils else PretrainTask, config, network),
        evaluate=functools.partial(evaluate_grounding, config),
        baselines=lambda batch: {},
        pictures=functools.partial(pictures_of, config),
        check=functools.partial(check_records, config.data, GroundingRecord),
    )


def evaluate_grounding(config: GroundingConfig, trained: Trained, folder: Path) -> dict[str, float]:
    """`grounding/` metrics in percent of the test expressions or of `data.eval_file`."""
    data, batch_size = config.data, config.evaluation.batch_size
    records, load_image = load_records(data, GroundingRecord, "test", config.evaluation.probe_items)
    reading = (trained.tokenizer, trained.normalise, trained.device, data.text_max_tokens)
    with eval_mode(trained.network):
        scorer = Scorer(trained.network, *reading, batch_size)
        resize = to_image_size if data.source == "scenes" else to_image_size_bicubic
        heat_from = config.evaluation.grounding_heat
        found = ground_records(scorer, records, load_image, data.image_size, batch_size, heat_from, resize)
    return {f"grounding/{name}": value for name, value in found.items()}
