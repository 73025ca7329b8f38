"""Reconstruction of masked images (RECON of MLIM). Legend: B batch, P patches in a grid [h, w], H, W in pixels."""

import torch
from torch import Tensor


def recon_loss(prediction: Tensor, image: Tensor, is_counted: Tensor | None, n_global: Tensor | int) -> Tensor:
    """Squared error summed over the colours of a pixel, summed over counted pixels / n_global.

    Args:
        prediction: float [B, 3, H, W].
        image: float [B, 3, H, W], values 0 to 1.
        is_counted: bool [B, h, w], the patches whose pixels count; None counts the whole image.
        n_global: counted pixels of the global batch.
    """
    error = torch.square(prediction.float() - image.float()).sum(dim=1)  # [B, H, W]
    if is_counted is not None:
        height, width = (pixels // patches for pixels, patches in zip(error.shape[1:], is_counted.shape[1:]))
        error = error * is_counted.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
    return error.sum() / n_global
