"""Masked language modelling. Legend: M masked tokens, V vocabulary."""

from torch import Tensor
from torch.nn import functional


def mlm_loss(logits: Tensor, labels: Tensor, n_global: Tensor | int) -> Tensor:
    """Cross-entropy over the vocabulary, sum over masked tokens / n_global.

    Args:
        logits: float [M, V] at masked tokens.
        labels: int64 [M], the hidden words.
        n_global: masked tokens of the global batch.
    """
    return functional.cross_entropy(logits.float(), labels, reduction="sum") / n_global
