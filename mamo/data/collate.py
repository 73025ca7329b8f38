"""From samples to a batch with its masks.

Legend: B batch, L text tokens, P patches, K masked slots, S ITM pool size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mamo.config import MaskingConfig
from mamo.data.pairs import Sample
from mamo.data.tokenizer import is_word_start
from mamo.masking import draw_image_mask, draw_replacements, draw_text_mask

MASK_STREAM = 1
"""Sub-stream of a sample's random numbers that draws masks and noise; loading draws from sub-stream 0."""


class Batch:
    """What the loop, the loader and `--plan` ask of a batch; a subclass is a dataclass of tensors and `skipped`."""

    __slots__ = ()
    image: Tensor
    """uint8 [B, 3, H, W], or [B, I, 3, H, W] for several images a sample."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...]
    """One line for each bad sample that was replaced."""

    def __len__(self) -> int:
        return self.image.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, start: int, stop: int) -> Self:
        """Samples `start` to `stop`."""
        return self._map(lambda tensor: tensor[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "skipped"}  # type: ignore[arg-type]

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)  # type: ignore[type-var]


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
    caption_id: Tensor
    """int64 [B], equal for the same caption."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """One line for each bad sample that was replaced."""


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: a function of these four numbers alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch, index, stream]))


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Texts -> (input_ids int64 [B, L], is_valid bool [B, L]), padded to the longest, cut to `max_tokens`."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


class PairCollator:
    """Tokenizes captions and draws the masks of a batch; runs in the loader's worker."""

    def __init__(
        self,
        tokenizer: Any,
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
        special = set(tokenizer.all_special_ids)
        self.ordinary_ids = np.array([token for token in range(len(tokenizer)) if token not in special])
        self.word_start = is_word_start(tokenizer) if masking.text_unit == "word" else None

    def __call__(self, drawn: Sequence[tuple[int, Sample]]) -> PairBatch:
        """Collate (epoch, sample) pairs."""
        samples = [sample for _, sample in drawn]
        input_ids, is_valid = tokenize(self.tokenizer, [sample.caption for sample in samples], self.text_max_tokens)
        special = torch.tensor(self.tokenizer.all_special_ids)
        is_maskable = (is_valid & ~torch.isin(input_ids, special)).numpy()  # [B, L]
        slots, shown_ids, visible, masked, noise = [], [], [], [], []
        for row, (epoch, sample) in enumerate(drawn):
            rng = sample_rng(self.seed, epoch, sample.sample_id, MASK_STREAM)
            shown, hidden = draw_image_mask(rng, self.grid, self.masking.image_ratio, self.masking.image_style)
            starts = None if self.word_start is None else self.word_start[input_ids[row].numpy()]
            slots.append(draw_text_mask(rng, is_maskable[row], self.masking.text_ratio, starts))
            visible.append(shown)
            masked.append(hidden)
            noise.append(rng.gumbel(size=(2, self.itm_pool_size)))
            hidden_ids = input_ids[row, slots[-1]].numpy()
            mask_id = self.tokenizer.mask_token_id
            if self.masking.text_replacement == "bert":
                shown_ids.append(draw_replacements(rng, hidden_ids, mask_id, self.ordinary_ids))
            else:
                shown_ids.append(np.full_like(hidden_ids, mask_id))
        text_slots, slot_is_valid = _pad(slots)
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
            caption_id=torch.tensor([sample.caption_id for sample in samples]),
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )


def _pad(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ragged positions -> (int64 [B, K] filled with zeros, bool [B, K] True where real); K is at least 1."""
    width = max(1, max(row.size for row in rows))
    positions = np.zeros((len(rows), width), dtype=np.int64)
    is_valid = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        positions[i, : row.size] = row
        is_valid[i, : row.size] = True
    return torch.from_numpy(positions), torch.from_numpy(is_valid)
