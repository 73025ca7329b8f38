"""Masked image modelling (MIM). Legend: B batch, K masked patches, D width of the target."""

import torch
from torch import Tensor
from torch.nn import functional


def patchify(image: Tensor, patch_size_px: tuple[int, int]) -> Tensor:
    """Cut float [B, 3, H, W] into row-major patches [B, P, 3 * patch_h * patch_w]."""
    return functional.unfold(image, patch_size_px, stride=patch_size_px).transpose(1, 2)  # [B, P, 3 * h * w]


def mim_loss(prediction: Tensor, target: Tensor, n_global: Tensor | int) -> Tensor:
    """Compute the squared error to the standardised target, mean over D, sum over patches / n_global.

    The target of each patch is standardised over D (zero mean, unit variance), as MAE does with pixels and data2vec
    with features. The paper does not state a norm; without one the scale of the moving teacher would scale the loss.

    Args:
        prediction: float [B, K, D].
        target: float [B, K, D], teacher features or pixels, without gradient.
        n_global: masked patches of the global batch.
    """
    standardised = functional.layer_norm(target.float(), target.shape[-1:], eps=1e-6)
    return torch.square(prediction.float() - standardised).mean(dim=-1).sum() / n_global
