"""Expressions with their images as pairs, and their foils."""

from typing import Any

import numpy as np

from mamo.data.cleaning import Clean
from mamo.data.pairs import Sample, hash_id
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import RecordDataset
from mamo.data.records import GroundingRecord


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
        return Sample(found.images[0], text, *ids, found.skipped, foil)
