"""Initial values of layers that start from no published weights."""

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn

POSITION_STD = 0.2
"""Standard deviation of image positions, in the encoder and in the fusion: about that of the patch content that they
are added to at the start. ViT's 0.02 is small against it, so that the places of objects would be lost."""
POSITION_TEMPERATURE = 10.0
"""Ratio of the highest to the lowest frequency: waves of 6 to 63 patches, where a grid has 6 to 24 patches a side."""


def init_position(position: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> None:
    """Initialise positions [1, num_prefix_tokens + P, D] in place, with a standard deviation of `POSITION_STD`.

    They start as sines and cosines of row and column: neighbours start alike, so that learning at one place helps at
    the next. Their mean over places, which carries no position, is subtracted. Class tokens start at zero.
    """
    table = build_sincos2d_pos_embed(list(grid), position.shape[-1], temperature=POSITION_TEMPERATURE)  # [P, D]
    table = table - table.mean(dim=0)
    with torch.no_grad():
        position.zero_()
        position[:, num_prefix_tokens:] = table * (POSITION_STD / table.std())


def init_like_bert(module: nn.Module) -> None:
    """Initialise one module as BERT does: normal(0, 0.02) cut at two sigmas for matrices, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_by_fan_in(module: nn.Module) -> None:
    """Initialise one module: normal(0, 1 / sqrt(inputs)) for matrices, zero biases: outputs are as large as inputs.

    For encoders and projections without pre-trained weights. BERT's and timm's 0.02 is a fifth of this at a width of
    128: a narrow encoder then attends evenly, adds almost nothing to its input, and learns nothing in its first
    hundreds of steps. The fusion keeps 0.02: with larger matrices there, masked words were learned later.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
