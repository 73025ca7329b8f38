"""ConvNeXt and Swin Transformer as towers: timm's features of a stage, masked pixels, sizes, weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mamo.models.stage_encoder import StageEncoder, has_stages, load_stage_weights
from mamo.models.towers import paint_masked

CONVNEXT, SWIN = "convnext_atto", "swin_tiny_patch4_window7_224"
SIZES: dict[str, dict[str, Any]] = {
    CONVNEXT: {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    SWIN: {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 2, 4, 8)},
}
"""timm's options of the whole networks of which `small_encoder` is a part."""
STAGES = ("stages", "layers")


def small_encoder(name: str, image_size_px: tuple[int, int], patch_size_px: int = 16, **options: Any) -> StageEncoder:
    torch.manual_seed(0)
    widths = {8: 16, 16: 32, 32: 64}
    width = widths[patch_size_px]
    sizes = {"width": width, "depth": patch_size_px.bit_length() - 2, "heads": width // 8}
    encoder = StageEncoder(name, image_size_px, patch_size_px=patch_size_px, **{**sizes, **options}).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def whole_twin(name: str, image_size_px: tuple[int, int]) -> Any:
    size = {"img_size": image_size_px} if name == SWIN else {}
    twin = timm.create_model(name, num_classes=7, **SIZES[name], **size).eval()
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return twin


def write(state: dict[str, Tensor], folder: Path) -> str:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "weights.safetensors")
    return f"{folder}/weights.safetensors"


@pytest.mark.parametrize("name", [CONVNEXT, SWIN])
@pytest.mark.parametrize(("patch_size_px", "stage"), [(8, 1), (16, 2), (32, 3)])
def test_published_weights_give_timms_features(name: str, patch_size_px: int, stage: int, tmp_path: Path) -> None:
    """Bug: another stage, features transposed, a tensor left random, a norm left out after the last stage."""
    twin, encoder = whole_twin(name, (64, 96)), small_encoder(name, (64, 96), patch_size_px)
    report = load_stage_weights(encoder, write(twin.state_dict(), tmp_path))
    assert encoder.grid == (64 // patch_size_px, 96 // patch_size_px)
    assert report.new == ("mask_colour",)
    assert {key for key in report.unused if key.startswith(("stages.", "layers."))} == {
        key
        for key in twin.state_dict()
        if key.startswith(tuple(f"{part}.{k}" for part in STAGES for k in range(stage + 1, 4)))
    }
    image = torch.randn(2, 3, 64, 96)
    (features,) = twin.forward_intermediates(image, indices=[stage], intermediates_only=True, norm=True)
    expected = features.flatten(2).transpose(1, 2)  # [B, P, D]
    torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.pool(encoder(image)), expected.mean(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [CONVNEXT, SWIN])
def test_masked_pixels_do_not_reach_the_output(name: str) -> None:
    """Bug: masked pixels leak through overlapping convolutions or shifted windows; a whole image is painted too."""
    encoder = small_encoder(name, (64, 64))
    image, visible = torch.randn(2, 3, 64, 64), torch.tensor([[3, 0, 9], [15, 6, 1]])
    is_seen = paint_masked(torch.ones_like(image), visible, (4, 4), torch.zeros(3)) > 0
    assert int(is_seen.sum()) == 2 * 3 * 3 * 256
    altered = torch.where(is_seen, image, 100.0)
    seen = encoder(image, visible)
    assert seen.shape == (2, 3, 32)
    assert torch.equal(encoder(altered, visible), seen)
    assert not torch.equal(encoder(altered), encoder(image))
    assert torch.equal(encoder(image, torch.arange(16).expand(2, -1)), encoder(image))
    painted = torch.where(is_seen, image, encoder.mask_colour.view(3, 1, 1))
    expected = encoder(painted).gather(1, visible[..., None].expand(-1, -1, 32))  # in the order of `visible`
    torch.testing.assert_close(seen, expected)


def test_painting_is_patch_by_patch() -> None:
    """Bug: rows and columns exchanged on a grid that is not square."""
    image, visible = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6), torch.tensor([[1], [5]])
    painted = paint_masked(image, visible, (2, 3), torch.tensor([-1.0, -2.0, -3.0]))
    for sample, patch in enumerate([1, 5]):
        for row in range(4):
            for column in range(6):
                is_seen = (row // 2) * 3 + column // 2 == patch
                wanted = image[sample, :, row, column] if is_seen else torch.tensor([-1.0, -2.0, -3.0])
                assert torch.equal(painted[sample, :, row, column], wanted)


@pytest.mark.parametrize("name", [CONVNEXT, SWIN])
def test_layers_are_the_blocks_and_all_are_trained(name: str) -> None:
    """Bug: blocks of later stages stay in the network, without a gradient; blocks that layer-wise settings miss."""
    encoder = small_encoder(name, (64, 64))
    assert len(encoder.layers) == 3
    encoder(torch.randn(2, 3, 64, 64), torch.tensor([[3, 0, 9], [15, 6, 1]])).square().sum().backward()
    unused = {key for key, parameter in encoder.named_parameters() if parameter.grad is None}
    assert not unused


def test_sizes_are_spread_over_stages() -> None:
    """Bug: a width, depth or number of heads that another stage gets, or that is ignored."""
    encoder = StageEncoder(SWIN, (64, 64), patch_size_px=16, width=64, depth=4, heads=4, dropout=0.1, drop_path=0.3)
    assert [len(stage.blocks) for stage in encoder.net.layers] == [1, 1, 2]
    assert [stage.blocks[0].attn.num_heads for stage in encoder.net.layers] == [1, 2, 4]
    assert [stage.blocks[0].dim for stage in encoder.net.layers] == [16, 32, 64]
    assert encoder.net.layers[1].blocks[0].attn.proj_drop.p == 0.1
    plain = StageEncoder(CONVNEXT, (64, 64), patch_size_px=8)
    assert plain.width == 80
    assert [len(stage.blocks) for stage in plain.net.stages] == [2, 2]
    assert not any(type(module).__name__ == "DropPath" for module in plain.modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (CONVNEXT, {"patch_size_px": 12}, r"patch_size_px: 12 is no stride of a stage .*; use one of 4, 8, 16, 32"),
        (CONVNEXT, {"width": 30, "patch_size_px": 16}, r"width: 30 cannot be halved 2 times"),
        (CONVNEXT, {"depth": 2, "patch_size_px": 16}, r"depth: 2 is less than one block in each of the 3 stages"),
        (
            CONVNEXT,
            {"dropout": 0.1, "patch_size_px": 16},
            r"dropout: 'convnext_atto' has convolutions, which use model.image.drop_path",
        ),
        (SWIN, {"heads": 5, "width": 64, "patch_size_px": 8}, r"heads: 5 gives stage 1 .* 5 heads"),
        (SWIN, {"patch_size_px": 32}, r"image size 48x64 px is not divisible by the patch size 32 px"),
        ("resnet18", {}, "is a ResNet"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name: str, options: dict[str, Any], message: str) -> None:
    """Bug: an assertion of the library, or a size that is rounded in silence."""
    with pytest.raises(ValueError, match=message):
        StageEncoder(name, (48, 64), **options)


def test_a_swins_tables_are_resampled_for_another_window(tmp_path: Path) -> None:
    """Bug: smaller images have smaller windows, whose tables are refused or left random without a word."""
    path = write(whole_twin(SWIN, (224, 224)).state_dict(), tmp_path)
    encoder = small_encoder(SWIN, (64, 64))
    report = load_stage_weights(encoder, path)
    assert report.interpolated
    assert all(key.endswith("relative_position_bias_table") for key in report.interpolated)


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    """Bug: half of a checkpoint is loaded without a word."""
    path = write(whole_twin(CONVNEXT, (64, 64)).state_dict(), tmp_path)
    encoder = StageEncoder(CONVNEXT, (64, 64), patch_size_px=16, depth=3)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"stem\.0\.weight is \[8, 3, 4, 4\], must be \[40, 3, 4, 4\]"):
        load_stage_weights(encoder, path)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_families_are_known_by_name() -> None:
    """Bug: a ViT in stages, or an unknown name that ends in a traceback."""
    assert has_stages(CONVNEXT)
    assert has_stages(SWIN)
    assert not has_stages("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"'convnext_ato' is not a timm model; did you mean .*convnext_atto"):
        has_stages("convnext_ato")
