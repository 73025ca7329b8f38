"""From samples to a batch with its masks.

Legend: B batch, L text tokens, P patches, K masked slots, S ITM pool size.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

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


def sample_rng(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: a function of these four numbers alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch, index, stream]))


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Texts -> (input_ids int64 [B, L], is_valid bool [B, L]), padded to the longest, cut to `max_tokens`."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()
