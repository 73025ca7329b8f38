"""Rows of masked positions, from which the heads of masked words predict.

On a CPU they are the masked positions. On a GPU they are all slots, with a mask: their number would have to be read by
the host, which then waits for the GPU, and shapes that follow values cannot be recorded in a CUDA graph.
"""

import torch
from torch import Tensor

IGNORED = -100
"""Label of a row that holds no masked word; `cross_entropy` leaves it out."""


def has_fixed_rows(device: torch.device) -> bool:
    """Say whether `masked_rows` returns every slot."""
    return device.type == "cuda"


def masked_rows(slots: Tensor, is_masked: Tensor) -> Tensor:
    """Return the rows [M, ...] of `slots` [B, K, ...] where bool [B, K] is True; on a GPU all rows [B * K, ...]."""
    return slots.flatten(0, 1) if has_fixed_rows(slots.device) else slots[is_masked]


def word_labels(input_ids: Tensor, is_masked: Tensor) -> Tensor:
    """Return the words of `masked_rows`: ids int64 [B, K] -> [M] or [B * K], `IGNORED` where bool [B, K] is False."""
    return masked_rows(input_ids.masked_fill(~is_masked, IGNORED), is_masked)
