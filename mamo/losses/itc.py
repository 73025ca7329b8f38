"""Image-text contrast (ITC). Legend: B batch, N candidates, D width of the ITC space."""

import torch
from torch import Tensor
from torch.nn import functional


def positives(image_id: Tensor, caption_id: Tensor, other_image_id: Tensor, other_caption_id: Tensor) -> Tensor:
    """Return bool [B, N], True where two samples have the same image or share a caption.

    Args:
        image_id: int64 [B], hashes.
        caption_id: int64 [B], or [B, C] of several captions of each sample.
        other_image_id: int64 [N].
        other_caption_id: int64 [N] or [N, C].
    """
    same_image = image_id[:, None] == other_image_id[None, :]
    if caption_id.numel() == len(caption_id) and other_caption_id.numel() == len(other_caption_id):
        return same_image | (caption_id.view(-1, 1) == other_caption_id.view(1, -1))
    return same_image | _share_any(caption_id, other_caption_id)  # [B, N]


def _share_any(own: Tensor, other: Tensor) -> Tensor:
    """Return bool [B, N], True where a row of `own` int64 [B, C] has a value of a row of `other` int64 [N, C]."""
    known = own.flatten().sort().values  # the first of equal values is the place of all
    rows = torch.arange(len(own), device=own.device)[:, None]
    has = torch.zeros(len(known) + 1, len(own), dtype=torch.bool, device=own.device)  # the last row is of no value
    has[torch.searchsorted(known, own.contiguous()), rows] = True
    place = torch.searchsorted(known, other.contiguous()).clamp(max=len(known) - 1)
    place = torch.where(known[place] == other, place, len(known))  # [N, C]
    found = torch.zeros(len(other), len(own), dtype=torch.bool, device=own.device)
    for column in place.unbind(dim=1):
        found |= has[column]
    return found.T


def itc_targets(similarity: Tensor, positive_index: Tensor, is_excluded: Tensor, alpha: float) -> Tensor:
    """Compute soft targets: alpha * softmax(teacher logits) + (1 - alpha) * one-hot (ALBEF, section 3.2).

    Args:
        similarity: float [B, N], the teacher's logits: its similarities divided by the temperature.
        positive_index: int64 [B], the candidate of each sample's own pair.
        is_excluded: bool [B, N], candidates that are neither positive nor negative.
        alpha: weight of the teacher's probabilities.

    Returns:
        float32 [B, N], rows that sum to 1, zero where excluded.
    """
    one_hot = functional.one_hot(positive_index, similarity.shape[1]).float()
    if alpha == 0:
        return one_hot
    teacher_probs = similarity.float().masked_fill(is_excluded, -torch.inf).softmax(dim=1)
    return alpha * teacher_probs + (1 - alpha) * one_hot


def itc_loss(similarity: Tensor, targets: Tensor, is_excluded: Tensor, n_global: Tensor | int) -> Tensor:
    """Compute the cross-entropy of one direction, - sum_bn targets[b, n] * log softmax(similarity[b])[n] / n_global.

    Args:
        similarity: float [B, N], the student's features against the candidates, divided by the temperature.
        targets: float [B, N] from `itc_targets`.
        is_excluded: bool [B, N], as for `itc_targets`; False at each sample's own candidate.
        n_global: samples of the global batch.
    """
    log_probability = similarity.float().masked_fill(is_excluded, -torch.inf).log_softmax(dim=1)
    terms = torch.where(is_excluded, 0.0, targets * log_probability.masked_fill(is_excluded, 0.0))
    return -terms.sum() / n_global


def sigmoid_loss(logits: Tensor, positive_index: Tensor, is_excluded: Tensor, n_global: Tensor | int) -> Tensor:
    """Compute one direction of SigLIP's loss (Zhai et al. 2023, Eq. 1): each pair is a match or none by itself.

    - sum_bn log sigmoid(z_bn * logits[b, n]) / n_global, with z = 1 at a sample's own candidate and -1 elsewhere.

    Args:
        logits: float [B, N], the similarities divided by the temperature, plus the bias.
        positive_index: int64 [B], the candidate of each sample's own pair.
        is_excluded: bool [B, N], candidates that are neither positive nor negative.
        n_global: samples of the global batch.
    """
    sign = torch.full_like(logits, -1.0, dtype=torch.float32).scatter(1, positive_index[:, None], 1.0)
    terms = functional.logsigmoid(sign * logits.float())
    return -terms.masked_fill(is_excluded, 0.0).sum() / n_global
