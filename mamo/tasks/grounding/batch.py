"""Expressions with their images as pairs, and their foils.

Legend: B batch, L text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mamo.data.cleaning import Clean
from mamo.data.collate import tokenize
from mamo.data.pairs import Sample, hash_id
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import RecordDataset
from mamo.data.records import GroundingRecord
from mamo.tasks.pretrain.batch import PairBatch, PairCollator


class ExpressionPairs:
    """Grounding records as image-text pairs: their boxes are not looked at."""

    group_size = 1

    def __init__(self, source: RecordDataset[GroundingRecord], clean: Clean = clean_caption) -> None:
        self.source, self.clean = source, clean

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint_items(self) -> Any:
        """Yield what the fingerprint of the data covers."""
        for record in self.source.relocated_records():
            yield f"{record.image}\t{record.expression}\t{record.foil}\n"

    def dataset_names(self) -> list[str]:
        """Name the data set."""
        return self.source.dataset_names()

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Load the image and the expression of record `index`; expressions of one image are never negatives of it."""
        found = self.source.load(index, rng)
        text, foil = self.clean(found.record.expression), self.clean(found.record.foil or "")
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
