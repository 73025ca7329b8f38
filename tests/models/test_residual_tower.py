"""The residual tower against torch's own convolutions, masked pixels, sizes, and Muon's kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamo.config.images import ImageEncoderConfig
from mamo.models.build import build_image_encoder
from mamo.models.residual_tower import MatrixConv2d, ResidualTower
from mamo.models.towers import paint_masked
from mamo.training.optim import layer_matrices
from tests.tiny import config_of

NAME = "mamo.models.residual_tower:ResidualTower"


def tower(image_size_px: tuple[int, int] = (32, 48), **sizes: Any) -> ResidualTower:
    torch.manual_seed(0)
    values = {"patch_size_px": 16, "width": 64, "depth": 5, "heads": 1} | sizes
    made = ResidualTower(ImageEncoderConfig(name=NAME, **values), image_size_px)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def plain(made: ResidualTower, image: Tensor) -> Tensor:
    """The same network of nn.Conv2d, block by block."""

    def convolve(part: MatrixConv2d, hidden: Tensor, side: int) -> Tensor:
        n_out, n_in = part.weight.shape[0], hidden.shape[1]
        twin = nn.Conv2d(n_in, n_out, side, stride=part.stride, padding=side // 2, bias=False)
        twin.weight = nn.Parameter(part.weight.detach().reshape(n_out, n_in, side, side))
        return twin(hidden)

    hidden = made.stem(image)
    for block in made.blocks:
        branch = functional.relu(block.first_norm(convolve(block.first, hidden, 3)))
        branch = block.second_norm(convolve(block.second, branch, 3))
        is_same = isinstance(block.shortcut, nn.Identity)
        hidden = functional.relu((hidden if is_same else convolve(block.shortcut, hidden, 1)) + branch)
    return hidden.flatten(2).transpose(1, 2)


def test_it_is_the_network_of_plain_convolutions() -> None:
    """Bug: a kernel read in another order, a stride in both convolutions or in another block, a shortcut left out."""
    made, image = tower(), torch.randn(2, 3, 32, 48)
    assert [block.second.weight.shape[0] for block in made.blocks] == [16, 32, 32, 64, 64]
    assert [block.first.stride for block in made.blocks] == [2, 2, 1, 2, 1]
    assert made.grid == (2, 3)
    found = made(image)
    assert found.shape == (2, 6, 64)
    torch.testing.assert_close(found, plain(made, image), atol=1e-5, rtol=1e-5)


def test_masked_pixels_do_not_reach_the_output_and_samples_are_apart() -> None:
    """Bug: masked pixels leak through overlapping convolutions; a norm mixes the samples of a batch."""
    made = tower((64, 64))
    image, visible = torch.randn(2, 3, 64, 64), torch.tensor([[3, 0, 9], [15, 6, 1]])
    is_seen = paint_masked(torch.ones_like(image), visible, (4, 4), torch.zeros(3)) > 0
    seen = made(image, visible)
    assert seen.shape == (2, 3, 64)
    assert torch.equal(made(torch.where(is_seen, image, 100.0), visible), seen)
    assert torch.equal(made(image, torch.arange(16).expand(2, -1)), made(image))
    torch.testing.assert_close(made(image[:1]), made(image)[:1], atol=1e-5, rtol=1e-5)
    assert made.train()(image).equal(made(image))


def test_muon_moves_every_kernel_but_the_first() -> None:
    """Bug: kernels are moved by AdamW, with which a tower of convolutions learns far less from as many pairs."""
    made = tower()
    kernels = [part.weight for part in made.modules() if isinstance(part, MatrixConv2d)]
    assert len(kernels) == 2 * 5 + 3
    assert [id(matrix) for matrix in layer_matrices(made)] == [id(kernel) for kernel in kernels]


def test_the_last_block_is_left_out_most_often() -> None:
    """Bug: a rate that is not passed on, or the same for all blocks; dropped blocks in evaluation."""
    made = tower(drop_path=0.4)
    assert [block.drop_path.drop_prob for block in made.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    image = torch.randn(2, 3, 32, 48)
    assert not made.train()(image).equal(made(image))
    assert made.eval()(image).equal(made(image))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size_px": 12}, "patch_size_px: 12 is no power of 2"),
        ({"patch_size_px": 2}, "patch_size_px: 2 is no power of 2"),
        ({"width": 72}, "width: 72 is no multiple of 32"),
        ({"depth": 2}, "depth: 2 is less than one block in each of 3"),
        ({"width": None}, "width: is null"),
        ({"depth": None}, "depth: is null"),
        ({"patch_size_px": None}, "patch_size_px: is null"),
        ({"dropout": 0.1}, r"dropout: .* use model\.image\.drop_path"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    """Bug: a message of the tensor library, or a width that is cut without a word."""
    with pytest.raises(ValueError, match=rf"model\.image\.{message}"):
        tower(**sizes)


def test_an_image_that_patches_do_not_divide_is_refused() -> None:
    """Bug: pixels at the edge are left out."""
    with pytest.raises(ValueError, match="image size 40x48 px is not divisible by the patch size 16 px"):
        tower((40, 48))


@pytest.mark.parametrize("key", ["stem", "pooling"])
def test_keys_of_a_vit_are_refused(key: str) -> None:
    """Bug: a setting that the tower does not read changes nothing, without a word."""
    value = {"stem": "convolutions", "pooling": "attention"}[key]
    sizes = {"name": NAME, "patch_size_px": 8, "width": 32, "depth": 2}
    with pytest.raises(ValueError, match=rf"model\.image\.{key}: .*ResidualTower' has no {value}"):
        build_image_encoder(config_of(model={"image": sizes | {key: value}}))
