"""Image-text pairs masked for MLIM: a batch and its collator.

Legend: B batch, L text tokens, P patches, S ITM pool size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.data.collate import MASK_STREAM, Batch, caption_id_rows, sample_rng, tokenize_words
from mamo.data.pairs import Sample
from mamo.data.tokenizer import check_words
from mamo.masking import draw_image_mask, draw_ratios, draw_text_mask
from mamo.tasks.mlim.config import MlimMaskingConfig


@dataclass(frozen=True, slots=True)
class MlimBatch(Batch):
    """Image-text pairs with their masks."""

    image: Tensor
    """uint8 [B, 3, H, W]."""
    input_ids: Tensor
    """int64 [B, L]."""
    is_valid: Tensor
    """bool [B, L], False at padding."""
    is_masked_word: Tensor
    """bool [B, L]."""
    is_masked_patch: Tensor
    """bool [B, P], row-major."""
    itm_noise: Tensor
    """float32 [B, S], standard Gumbel noise that draws another text from the sample's pool."""
    image_id: Tensor
    """int64 [B], equal for the same image."""
    caption_ids: Tensor
    """int64 [B, C], equal for the same caption: the drawn one's, then those of the record's other captions."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """One line for each bad sample that was replaced."""


class MlimCollator:
    """Tokenizes captions and draws modality-aware masks; runs in the loader's worker."""

    n_caption_ids = 1
    """Number of caption ids of a sample, set by the data set: `PairDataset.n_caption_ids`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_max_tokens: int,
        masking: MlimMaskingConfig,
        grid: tuple[int, int],
        itm_pool_size: int,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_max_tokens = text_max_tokens
        self.masking = masking
        self.grid = grid
        self.itm_pool_size = itm_pool_size
        self.seed = seed
        if masking.text_unit == "word":
            check_words(tokenizer)

    def __call__(self, drawn: Sequence[tuple[int, Sample]]) -> MlimBatch:
        """Collate (epoch, sample) pairs."""
        samples, masking = [sample for _, sample in drawn], self.masking
        input_ids, is_valid, words = tokenize_words(
            self.tokenizer,
            [sample.caption for sample in samples],
            self.text_max_tokens,
            by_word=masking.text_unit == "word",
        )
        special = torch.tensor(self.tokenizer.all_special_ids)
        is_maskable = (is_valid & ~torch.isin(input_ids, special)).numpy()  # [B, L]
        is_masked_word = np.zeros(input_ids.shape, dtype=bool)
        is_masked_patch = np.zeros((len(samples), self.grid[0] * self.grid[1]), dtype=bool)
        noise = []
        for row, (epoch, sample) in enumerate(drawn):
            rng = sample_rng(self.seed, epoch, sample.sample_id, MASK_STREAM)
            image_ratio, text_ratio = draw_ratios(rng, masking.image_ratio, masking.text_ratio, masking.light_ratio)
            if image_ratio:
                _, hidden = draw_image_mask(rng, self.grid, image_ratio, masking.image_style)
                is_masked_patch[row, hidden] = True
            if text_ratio:
                own_words = None if words is None else words[row]
                is_masked_word[row, draw_text_mask(rng, is_maskable[row], text_ratio, own_words)] = True
            noise.append(rng.gumbel(size=self.itm_pool_size))
        return MlimBatch(
            image=torch.stack([sample.image for sample in samples]),
            input_ids=input_ids,
            is_valid=is_valid,
            is_masked_word=torch.from_numpy(is_masked_word),
            is_masked_patch=torch.from_numpy(is_masked_patch),
            itm_noise=torch.from_numpy(np.stack(noise)).float(),
            image_id=torch.tensor([sample.image_id for sample in samples]),
            caption_ids=caption_id_rows([(s.caption_id, s.caption_ids) for s in samples], self.n_caption_ids),
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )
