"""Collate image-text pairs and draw both masked views.

Legend: B batch, L text tokens, P patches, K masked positions, S ITM pool size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.config.objective import MaskingConfig
from mamo.data.collate import MASK_STREAM, Batch, caption_id_rows, sample_rng, tokenize, tokenize_words
from mamo.data.pairs import Sample
from mamo.data.tokenizer import check_words
from mamo.masking import draw_image_mask, draw_replacements, draw_text_mask
from mamo.tasks.pretrain.config import PretrainConfig


@dataclass(frozen=True, slots=True)
class PairBatch(Batch):
    """Image-text pairs with both masked views, as plain tensors."""

    image: Tensor
    """uint8 [B, 3, H, W]."""
    input_ids: Tensor
    """int64 [B, L]."""
    is_valid: Tensor
    """bool [B, L], False at padding."""
    masked_input_ids: Tensor
    """int64 [B, L], `input_ids` with [MASK] at the chosen slots, or what `masking.text_replacement` puts there."""
    text_slots: Tensor
    """int64 [B, K_text], masked positions; rows with fewer end in zeros."""
    text_slot_is_valid: Tensor
    """bool [B, K_text], False at that filling."""
    visible_patches: Tensor
    """int64 [B, P_visible], ascending."""
    masked_patches: Tensor
    """int64 [B, K_image], ascending."""
    itm_noise: Tensor
    """float32 [B, 2, S], standard Gumbel noise that draws a text and an image negative from the sample's pool."""
    image_id: Tensor
    """int64 [B], equal for the same image."""
    caption_ids: Tensor
    """int64 [B, C], equal for the same caption: the drawn one's, then those of the record's other captions."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """One line for each bad sample that was replaced."""

    @property
    def caption_id(self) -> Tensor:
        """Return the ids of the drawn captions, int64 [B]."""
        return self.caption_ids[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortPairBatch(PairBatch):
    """Pairs with a short text each."""

    short_input_ids: Tensor
    """int64 [B, L_short]."""
    short_is_valid: Tensor
    """bool [B, L_short], False at padding."""


class PairCollator:
    """Tokenizes captions and draws the masks of a batch; runs in the loader's worker."""

    n_caption_ids = 1
    """Number of caption ids of a sample, set by the data set: `PairDataset.n_caption_ids`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_max_tokens: int,
        masking: MaskingConfig,
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
        self.length_multiple = 1
        """Tokens of a batch are a multiple of it, and slots follow from the tokens: 1 where shapes cost nothing."""
        special = set(tokenizer.all_special_ids)
        self.ordinary_ids = np.array([token for token in range(len(tokenizer)) if token not in special])
        self.has_mask = tokenizer.mask_token_id is not None
        if masking.text_unit == "word":
            check_words(tokenizer)

    def __call__(self, drawn: Sequence[tuple[int, Sample]]) -> PairBatch:
        """Collate (epoch, sample) pairs."""
        samples = [sample for _, sample in drawn]
        captions = [sample.caption for sample in samples]
        by_word = self.masking.text_unit == "word"
        input_ids, is_valid, words = tokenize_words(
            self.tokenizer, captions, self.text_max_tokens, self.length_multiple, by_word
        )
        special = torch.tensor(self.tokenizer.all_special_ids)
        is_maskable = (is_valid & ~torch.isin(input_ids, special)).numpy() & self.has_mask  # [B, L]
        slots, shown_ids, visible, masked, noise = [], [], [], [], []
        for row, (epoch, sample) in enumerate(drawn):
            rng = sample_rng(self.seed, epoch, sample.sample_id, MASK_STREAM)
            shown, hidden = draw_image_mask(rng, self.grid, self.masking.image_ratio, self.masking.image_style)
            own_words = None if words is None else words[row]
            slots.append(draw_text_mask(rng, is_maskable[row], self.masking.text_ratio, own_words))
            visible.append(shown)
            masked.append(hidden)
            noise.append(rng.gumbel(size=(2, self.itm_pool_size)))
            hidden_ids = input_ids[row, slots[-1]].numpy()
            mask_id = self.tokenizer.mask_token_id if self.has_mask else 0  # then nothing is hidden
            if self.masking.text_replacement == "bert":
                shown_ids.append(draw_replacements(rng, hidden_ids, mask_id, self.ordinary_ids))
            else:
                shown_ids.append(np.full_like(hidden_ids, mask_id))
        text_slots, slot_is_valid = _pad(slots, self._n_slots(input_ids.shape[1]))
        masked_input_ids = input_ids.clone()
        rows = torch.arange(len(samples))[:, None].expand_as(text_slots)[slot_is_valid]
        masked_input_ids[rows, text_slots[slot_is_valid]] = torch.from_numpy(np.concatenate(shown_ids))
        return PairBatch(
            image=torch.stack([sample.image for sample in samples]),
            input_ids=input_ids,
            is_valid=is_valid,
            masked_input_ids=masked_input_ids,
            text_slots=text_slots,
            text_slot_is_valid=slot_is_valid,
            visible_patches=torch.from_numpy(np.stack(visible)),
            masked_patches=torch.from_numpy(np.stack(masked)),
            itm_noise=torch.from_numpy(np.stack(noise)).float(),
            image_id=torch.tensor([sample.image_id for sample in samples]),
            caption_ids=caption_id_rows([(s.caption_id, s.caption_ids) for s in samples], self.n_caption_ids),
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )

    def _n_slots(self, n_tokens: int) -> int:
        """Return the slots of a batch of so many tokens; with `length_multiple` 1 as many as it needs."""
        if self.length_multiple == 1:
            return 1
        wanted = math.ceil(self.masking.text_ratio * n_tokens) + SLOT_SLACK
        return min(-(-wanted // self.length_multiple) * self.length_multiple, n_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoilBatch(PairBatch):
    """Pairs with foils: texts that are false of the image."""

    foil_input_ids: Tensor
    """int64 [B, L]."""
    foil_is_valid: Tensor
    """bool [B, L], False at padding."""
    has_foil: Tensor
    """bool [B], False where no foil is known and the row is to be ignored."""


class FoilCollator(PairCollator):
    """Pairs with their foils; runs in the loader's worker."""

    def __call__(self, drawn: Sequence[tuple[int, Sample]]) -> FoilBatch:
        """Collate (epoch, sample) pairs."""
        pairs = super().__call__(drawn)
        foils = [sample.foil for _, sample in drawn]
        ids, is_valid = tokenize(self.tokenizer, foils, self.text_max_tokens)
        return FoilBatch(
            **pairs.tensors(),
            skipped=pairs.skipped,
            foil_input_ids=ids,
            foil_is_valid=is_valid,
            has_foil=torch.tensor([bool(foil) for foil in foils]),
        )


class ShortPairCollator(PairCollator):
    """Pairs with their short texts; runs in the loader's worker."""

    def __call__(self, drawn: Sequence[tuple[int, Sample]]) -> ShortPairBatch:
        """Collate (epoch, sample) pairs."""
        pairs = super().__call__(drawn)
        texts = [sample.short or sample.caption for _, sample in drawn]
        ids, is_valid = tokenize(self.tokenizer, texts, self.text_max_tokens, self.length_multiple)
        short = {"short_input_ids": ids, "short_is_valid": is_valid}
        return ShortPairBatch(**pairs.tensors(), skipped=pairs.skipped, **short)


SLOT_SLACK = 4
"""Slots beyond the share of masked words: a word of several tokens is masked whole."""


def _pad(rows: list[np.ndarray], least: int) -> tuple[Tensor, Tensor]:
    """Return ragged positions -> (int64 [B, K] filled with zeros, bool [B, K] True where real), K at least `least`."""
    width = max(least, max(row.size for row in rows))
    positions = np.zeros((len(rows), width), dtype=np.int64)
    is_valid = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        positions[i, : row.size] = row
        is_valid[i, : row.size] = True
    return torch.from_numpy(positions), torch.from_numpy(is_valid)


def pair_collator(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, grid: tuple[int, int]) -> PairCollator:
    """Return tokenizer and masks of a config, with foils where ITM reads them, or short texts where a pass does."""
    kind = PairCollator if config.losses.itm_negatives == "pool" else FoilCollator
    kind = ShortPairCollator if config.masking.text_for_masked_image == "short" else kind
    return kind(tokenizer, config.data.text_max_tokens, config.masking, grid, config.losses.itm_pool_size, config.seed)
