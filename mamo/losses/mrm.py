"""Masked representation modelling (MRM). Legend: M masked positions, D width of fusion."""

import torch
from torch import Tensor
from torch.nn import functional


def mrm_loss(prediction: Tensor, target: Tensor, n_global: Tensor | int, is_valid: Tensor | None = None) -> Tensor:
    """Compute || p / |p| - t / |t| ||^2 = 2 - 2 cos(p, t), sum over masked positions / n_global.

    Args:
        prediction: float [M, D] (or [B, K, D]), the student's predictor's output.
        target: float of the same shape, the teacher's fused token of the clean pair, without gradient.
        n_global: masked positions of this modality in the global batch.
        is_valid: bool [M], False for rows that do not count; None counts all.
    """
    unit_prediction = functional.normalize(prediction.float(), dim=-1)
    unit_target = functional.normalize(target.float(), dim=-1)
    squares = torch.square(unit_prediction - unit_target)
    if is_valid is not None:
        squares = torch.where(is_valid[:, None], squares, 0.0)
    return squares.sum() / n_global
