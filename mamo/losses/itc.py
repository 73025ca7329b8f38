"""Image-text contrast. Legend: B batch, N candidates, D width of the ITC space."""

import torch
from torch import Tensor
from torch.nn import functional


def positives(image_id: Tensor, caption_id: Tensor, other_image_id: Tensor, other_caption_id: Tensor) -> Tensor:
    """bool [B, N]: True where two samples show the same image or carry the same caption (both int64 hashes)."""
    same_image = image_id[:, None] == other_image_id[None, :]
    same_caption = caption_id[:, None] == other_caption_id[None, :]
    return same_image | same_caption  # [B, N]


def itc_targets(similarity: Tensor, own: Tensor, is_excluded: Tensor, alpha: float) -> Tensor:
    """Soft targets: alpha * softmax(teacher similarity / temperature) + (1 - alpha) * one-hot (ALBEF, section 3.2).

    Args:
        similarity: float [B, N], the teacher's similarities already divided by the temperature.
        own: int64 [B], the index of each sample's own candidate.
        is_excluded: bool [B, N], candidates that count neither for nor against.
        alpha: share of the teacher's opinion.

    Returns:
        float32 [B, N], rows that sum to 1, zero where excluded.
    """
    one_hot = functional.one_hot(own, similarity.shape[1]).float()
    if alpha == 0:
        return one_hot
    opinion = similarity.float().masked_fill(is_excluded, -torch.inf).softmax(dim=1)
    return alpha * opinion + (1 - alpha) * one_hot


def itc_loss(similarity: Tensor, targets: Tensor, is_excluded: Tensor, n_global: Tensor | int) -> Tensor:
    """Cross-entropy of one direction: - sum_b sum_n targets[b, n] * log softmax(similarity[b])[n] / n_global.

    Args:
        similarity: float [B, N], online features against candidates, divided by the temperature.
        targets: float [B, N] from `itc_targets`.
        is_excluded: bool [B, N], False at each sample's own candidate.
        n_global: samples of the global batch.
    """
    log_probability = similarity.float().masked_fill(is_excluded, -torch.inf).log_softmax(dim=1)
    terms = torch.where(is_excluded, 0.0, targets * log_probability.masked_fill(is_excluded, 0.0))
    return -terms.sum() / n_global
