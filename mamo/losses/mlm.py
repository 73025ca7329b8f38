"""Masked language modelling (MLM). Legend: M masked tokens, V vocabulary."""

from torch import Tensor
from torch.nn import functional


def mlm_loss(
    logits: Tensor, labels: Tensor, n_global: Tensor | int, teacher_probs: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Compute the cross-entropy over the vocabulary, sum over masked tokens / n_global.

    With ``teacher_probs`` (momentum distillation; ALBEF, section 3.4) the target is
    alpha * teacher_probs + (1 - alpha) * one-hot label.

    Args:
        logits: float [M, V] at masked tokens.
        labels: int64 [M], the hidden words; `mamo.losses.rows.IGNORED` where there is none.
        n_global: masked tokens of the global batch.
        teacher_probs: float [M, V], without gradient, 0 where there is no word; None for hard labels.
        alpha: weight of ``teacher_probs``.
    """
    hard = functional.cross_entropy(logits.float(), labels, reduction="sum")
    if teacher_probs is None:
        return hard / n_global
    soft = functional.cross_entropy(logits.float(), teacher_probs.float(), reduction="sum")
    return ((1 - alpha) * hard + alpha * soft) / n_global
