"""How encoders start from nothing."""

import pytest
import torch
from torch import nn
from transformers import BertConfig

from mamo.models.fusion import Fusion
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder

ENCODERS = {
    "image": lambda: ImageEncoder("vit_tiny_patch16_224", (32, 32), patch_size_px=8, width=128, depth=2, heads=4),
    "text": lambda: TextEncoder(
        BertConfig(vocab_size=50, hidden_size=128, num_attention_heads=4, intermediate_size=512), layers=2
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_keep_the_size_of_their_input(name: str) -> None:
    """Bug: the published 0.02 in a narrow encoder, whose layers then add next to nothing to their input."""
    torch.manual_seed(0)
    linears = [module for module in ENCODERS[name]().modules() if isinstance(module, nn.Linear)]
    assert len(linears) >= 2 * 4
    for linear in linears:
        output = linear(torch.randn(4000, linear.in_features))
        assert 0.9 < output.std() < 1.1
        assert not linear.bias.any()


def test_image_positions_are_as_large_as_the_patches() -> None:
    """Bug: ViT's 0.02, lost beside the patch content that it is added to."""
    torch.manual_seed(0)
    encoder = ENCODERS["image"]()
    fusion = Fusion(128, 1, 4, 256, image_width=128, grid=(4, 4), num_prefix_tokens=1, text_width=128)
    content = encoder.vit.patch_embed(torch.randn(50, 3, 32, 32)).std()
    for position, beside in (
        (encoder.vit.pos_embed, content),
        (fusion.image_position, fusion.image_projection(torch.randn(50, 128)).std()),
    ):
        assert 0.25 < position.std() / beside < 4


def test_image_positions_start_as_waves_of_row_and_column() -> None:
    """Bug: rows and columns exchanged on a grid that is not square, or a mean that says nothing of the place."""
    position = Fusion(64, 1, 4, 128, image_width=64, grid=(3, 5), num_prefix_tokens=1, text_width=64).image_position[0]
    assert not position[0].any()
    table = position[1:].unflatten(0, (3, 5))  # [rows, columns, D]
    torch.testing.assert_close(position[1:].mean(dim=0), torch.zeros(64), atol=1e-6, rtol=0)
    differs_by_row = (table[1:] - table[:-1]).abs().amax(dim=(0, 1)) > 1e-6
    differs_by_column = (table[:, 1:] - table[:, :-1]).abs().amax(dim=(0, 1)) > 1e-6
    assert (differs_by_row ^ differs_by_column).all()
    assert differs_by_row.sum() == 32
    # the fastest wave turns by one radian a patch, the slowest by a tenth: equal steps along the grid, not along rows
    column = table[0][:, differs_by_column] / table[0][:, differs_by_column].std(dim=0)
    assert ((column[1:] - column[:-1]).norm(dim=1) > 0.5).all()
