"""Masked language modelling. Legend: M masked tokens, V vocabulary."""

from torch import Tensor
from torch.nn import functional


def mlm_loss(
    logits: Tensor, labels: Tensor, n_global: Tensor | int, guess: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Cross-entropy over the vocabulary, sum over masked tokens / n_global.

    With a teacher's guess, momentum distillation (ALBEF, section 3.4): the target is
    alpha * guess + (1 - alpha) * one-hot label.

    Args:
        logits: float [M, V] at masked tokens.
        labels: int64 [M], the hidden words.
        n_global: masked tokens of the global batch.
        guess: float [M, V], the teacher's probabilities, without gradient; None for the labels alone.
        alpha: share of the guess.
    """
    hard = functional.cross_entropy(logits.float(), labels, reduction="sum")
    if guess is None:
        return hard / n_global
    soft = functional.cross_entropy(logits.float(), guess.float(), reduction="sum")
    return ((1 - alpha) * hard + alpha * soft) / n_global
