"""Sentences about one image or a pair of images as a batch.

Legend: B statements, I images of each, L text tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.data.cleaning import Clean
from mamo.data.collate import Batch, tokenize
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import RecordSample
from mamo.data.records import ReasoningRecord

_SIDES = re.compile(r"\b(left|right|first|second)", re.IGNORECASE)


def is_ordered(sentence: str) -> bool:
    """Return whether the order of the images may matter to a sentence.

    It may where the sentence says left, right, first or second, or a word that begins so ("leftmost"). All others mean
    the same of the two images exchanged.
    """
    return _SIDES.search(sentence) is not None


@dataclass(frozen=True, slots=True)
class ReasoningBatch(Batch):
    """Sentences with their images."""

    image: Tensor
    """uint8 [B, I, 3, H, W], left to right."""
    input_ids: Tensor
    """int64 [B, L]."""
    is_valid: Tensor
    """bool [B, L], False at padding."""
    is_ordered: Tensor
    """bool [B], see `is_ordered`."""
    label: Tensor
    """bool [B], whether the sentence is true."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """One line for each bad sample that was replaced."""


class ReasoningCollator:
    """Tokenizes sentences; runs in the loader's worker."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, text_max_tokens: int, seed: int, clean: Clean = clean_caption
    ) -> None:
        self.tokenizer, self.clean = tokenizer, clean
        self.text_max_tokens = text_max_tokens
        self.seed = seed

    def __call__(self, drawn: Sequence[tuple[int, RecordSample[ReasoningRecord]]]) -> ReasoningBatch:
        """Collate (epoch, sample) pairs."""
        samples = [sample for _, sample in drawn]
        sentences = [sample.record.sentence for sample in samples]
        input_ids, is_valid = tokenize(self.tokenizer, list(map(self.clean, sentences)), self.text_max_tokens)
        return ReasoningBatch(
            image=torch.stack([sample.images for sample in samples]),
            input_ids=input_ids,
            is_valid=is_valid,
            is_ordered=torch.tensor([is_ordered(text) for text in sentences]),
            label=torch.tensor([sample.record.label for sample in samples]),
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )


def same_number_of_images(records: Sequence[ReasoningRecord], what: str) -> int:
    """Return images a statement. Raises ValueError, naming the first, where one has another number than the others."""
    n_images = len(records[0].images)
    for record in records:
        if len(record.images) != n_images:
            raise ValueError(
                f"{what}: identifier {record.identifier} has {len(record.images)} image(s), others {n_images}; "
                "keep statements about one image and about pairs in separate files"
            )
    return n_images
