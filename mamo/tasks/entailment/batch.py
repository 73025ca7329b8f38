"""Sentences about images with their labels as a batch. Legend: B statements, L text tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.data.cleaning import Clean
from mamo.data.collate import Batch, tokenize
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import RecordSample
from mamo.data.records import ENTAILMENT_LABELS, EntailmentRecord


@dataclass(frozen=True, slots=True)
class EntailmentBatch(Batch):
    """Sentences with their images."""

    image: Tensor
    """uint8 [B, 3, H, W]."""
    input_ids: Tensor
    """int64 [B, L]."""
    is_valid: Tensor
    """bool [B, L], False at padding."""
    label: Tensor
    """int64 [B], index in `ENTAILMENT_LABELS`."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """One line for each bad sample that was replaced."""


class EntailmentCollator:
    """Tokenizes sentences; runs in the loader's worker."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, text_max_tokens: int, seed: int, clean: Clean = clean_caption
    ) -> None:
        self.tokenizer, self.clean = tokenizer, clean
        self.text_max_tokens = text_max_tokens
        self.seed = seed

    def __call__(self, drawn: Sequence[tuple[int, RecordSample[EntailmentRecord]]]) -> EntailmentBatch:
        """Collate (epoch, sample) pairs."""
        samples = [sample for _, sample in drawn]
        sentences = [self.clean(sample.record.sentence) for sample in samples]
        input_ids, is_valid = tokenize(self.tokenizer, sentences, self.text_max_tokens)
        return EntailmentBatch(
            image=torch.stack([sample.images[0] for sample in samples]),
            input_ids=input_ids,
            is_valid=is_valid,
            label=torch.tensor([ENTAILMENT_LABELS.index(sample.record.label) for sample in samples]),
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )
