"""Image-text matching (ITM) with hard negatives. Legend: B batch, N pools, S pool size."""

import torch
from torch import Tensor
from torch.nn import functional


def draw_negatives(similarity: Tensor, is_positive: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each row a column that is no positive, with probability proportional to exp(similarity).

    Uses the Gumbel-max trick: argmax(similarity + noise) with standard Gumbel noise is a sample of softmax(similarity).
    It needs no random state of its own and cannot overflow.

    Args:
        similarity: float [N, S, S], ITC logits of row against column within each pool. Infinities become the largest or
            smallest finite logit, NaN becomes 0.
        is_positive: bool [N, S, S], pairs that must not be drawn (the diagonal among them).
        noise: float [N, S, S], standard Gumbel.

    Returns:
        (negative, has_negative): int64 [N, S] columns, and bool [N, S], False where a pool has no negative
        (a pool of one, or one in which every sample matches); the column is then the row itself and must be ignored.
    """
    finite = torch.nan_to_num(similarity.detach().float(), nan=0.0, posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4)
    score = (finite + noise).masked_fill(is_positive, -torch.inf)
    has_negative = ~is_positive.all(dim=2)  # [N, S]
    negative = torch.where(has_negative, score.argmax(dim=2), torch.arange(score.shape[1], device=score.device))
    return negative, has_negative


def itm_loss(logits: Tensor, is_match: Tensor, is_valid: Tensor, n_global: Tensor | int) -> Tensor:
    """Compute the two-class cross-entropy, sum over valid pairs / n_global.

    Args:
        logits: float [M, 2], class 1 = match.
        is_match: bool [M].
        is_valid: bool [M], False for rows without a negative.
        n_global: number of valid pairs in the global batch.
    """
    losses = functional.cross_entropy(logits.float(), is_match.long(), reduction="none")
    return torch.where(is_valid, losses, 0.0).sum() / n_global
