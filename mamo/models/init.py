"""How layers start where no published weights do."""

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn

POSITION_STD = 0.2
"""Of image positions, in the encoder and in fusion: about as large as the patch content that they are added to at the
start. ViT's 0.02 is lost beside it, and with it where an object stands."""
POSITION_TEMPERATURE = 10.0
"""Ratio of the highest to the lowest frequency: waves of 6 to 63 patches, where a grid has 6 to 24 patches a side."""


def init_position(position: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> None:
    """Start learned positions [1, num_prefix_tokens + P, D] in place: sines and cosines of row and column, of `POSITION_STD`.

    Neighbours start alike, so what is learned of one place helps at the next. The mean over places is taken out: it
    would say nothing. Class tokens start at zero.
    """
    table = build_sincos2d_pos_embed(list(grid), position.shape[-1], temperature=POSITION_TEMPERATURE)  # [P, D]
    table = table - table.mean(dim=0)
    with torch.no_grad():
        position.zero_()
        position[:, num_prefix_tokens:] = table * (POSITION_STD / table.std())


def init_like_bert(module: nn.Module) -> None:
    """Initialise one module in BERT's way: normal(0, 0.02) cut at two sigmas for matrices, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_by_fan_in(module: nn.Module) -> None:
    """Initialise one module: normal(0, 1 / sqrt(inputs)) for matrices, zero biases: outputs are as large as inputs.

    For encoders and projections that start from nothing. BERT's and timm's 0.02 is a fifth of this at a width of 128: a
    narrow encoder then attends evenly, adds next to nothing to its input, and sleeps through its first hundreds of
    steps. Fusion keeps 0.02: with larger matrices there, masked words were learned later, not sooner.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
