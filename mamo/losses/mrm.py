"""Masked representation modelling (MRM). Legend: M masked positions, D width of fusion."""

import torch
from torch import Tensor
from torch.nn import functional


def mrm_loss(prediction: Tensor, target: Tensor, n_global: Tensor | int) -> Tensor:
    """Compute || p / |p| - t / |t| ||^2 = 2 - 2 cos(p, t), sum over masked positions / n_global.

    Args:
        prediction: float [M, D] (or [B, K, D]), the student's predictor's output.
        target: float of the same shape, the teacher's fused token of the clean pair, without gradient.
        n_global: masked positions of this modality in the global batch.
    """
    unit_prediction = functional.normalize(prediction.float(), dim=-1)
    unit_target = functional.normalize(target.float(), dim=-1)
    return torch.square(unit_prediction - unit_target).sum() / n_global
