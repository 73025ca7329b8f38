from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mamo.models.image_encoder import ImageEncoder, load_image_weights

CLASS_TOKEN, NO_CLASS_TOKEN, SIGLIP = (
    "vit_tiny_patch16_224",
    "vit_medium_patch16_gap_240",
    "vit_base_patch16_siglip_224",
)
NO_EMBED_CLASS, PRE_NORM = "deit3_small_patch16_224", "vit_base_patch32_clip_224"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def small_encoder(name: str, image_size_px: tuple[int, int]) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(name, image_size_px, patch_size_px=8, width=32, depth=2, heads=4).eval()
    for parameter in encoder.parameters():  # timm starts biases and the class token near zero: make every one matter
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def timm_twin(encoder: ImageEncoder, name: str, image_size_px: tuple[int, int], **kwargs: object) -> torch.nn.Module:
    """timm's own model, with its pooling and classifier, holding the encoder's weights."""
    twin = timm.create_model(name, img_size=image_size_px, num_classes=7, **SMALL, **kwargs).eval()
    missing, unexpected = twin.load_state_dict(encoder.vit.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("head.", "attn_pool.", "fc_norm.")) for key in missing)
    return twin


def write(state: dict[str, Tensor], folder: Path) -> str:
    path = f"{folder}/weights.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "n_prefix"), [(CLASS_TOKEN, 1), (NO_CLASS_TOKEN, 0), (SIGLIP, 0), (NO_EMBED_CLASS, 1), (PRE_NORM, 1)]
)
@pytest.mark.parametrize("image_size_px", [(32, 32), (16, 40)])
def test_whole_image_equals_timm(name: str, n_prefix: int, image_size_px: tuple[int, int]) -> None:
    """Bug: a step of timm's forward is left out or reordered (norm_pre, positions of the class token)."""
    encoder = small_encoder(name, image_size_px)
    image = torch.randn(3, 3, *image_size_px)
    tokens = encoder(image)
    assert encoder.n_prefix == n_prefix
    assert encoder.grid == (image_size_px[0] // 8, image_size_px[1] // 8)
    assert tokens.shape == (3, n_prefix + encoder.grid[0] * encoder.grid[1], encoder.width)
    torch.testing.assert_close(
        tokens, timm_twin(encoder, name, image_size_px).forward_features(image), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", [CLASS_TOKEN, NO_CLASS_TOKEN, NO_EMBED_CLASS, PRE_NORM])
def test_visible_patches_equal_encoding_the_gathered_patches(name: str) -> None:
    """Bug: positions are added after the gather, the class token is dropped, or the order of ``visible`` is lost."""
    encoder = small_encoder(name, (16, 40))
    image = torch.randn(3, 3, 16, 40)
    visible = torch.tensor([[7, 0, 3], [1, 2, 9], [4, 5, 6]])
    vit = encoder.vit
    rows = []
    for sample, indices in zip(image, visible):
        grid = torch.nn.functional.conv2d(
            sample[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8
        )
        patches = grid[0].flatten(1).T  # [P, D], row-major
        positions = vit.pos_embed[0]
        patch_positions = positions[-10:]
        sequence = [patches[i] + patch_positions[i] for i in indices.tolist()]
        if encoder.n_prefix:
            class_position = positions[0] if len(positions) == 11 else torch.zeros(32)
            sequence.insert(0, vit.cls_token[0, 0] + class_position)
        rows.append(vit.norm(vit.blocks(vit.norm_pre(torch.stack(sequence)[None])))[0])
    torch.testing.assert_close(encoder(image, visible), torch.stack(rows), atol=1e-5, rtol=0)


def test_hidden_patches_do_not_reach_the_output() -> None:
    """Bug: masked pixels leak into the encoding of the visible patches."""
    encoder = small_encoder(CLASS_TOKEN, (32, 32))
    image, visible = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5]])
    altered = image.clone()
    altered[:, :, 16:] = 100.0  # rows of patches 8 to 15
    assert torch.equal(encoder(image, visible), encoder(altered, visible))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("vit_relpos_small_patch16_224", "RelPos"),
        ("resnet18", "ResNet"),
        ("vit_tiny_r_s16_p8_224", "convolutional"),
        ("deit_tiny_distilled_patch16_224", "distillation"),
        ("vit_small_patch14_reg4_dinov2", "registers"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),  # the near name
    ],
)
def test_other_models_are_refused_by_name(name: str, reason: str) -> None:
    """Bug: a model whose positions or prefix we do not handle is built and silently encoded wrongly."""
    with pytest.raises(ValueError, match=reason) as error:
        ImageEncoder(name, (224, 224))
    assert name in str(error.value)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """Bug: an image that the patch does not divide is cropped in silence, or heads crash in a reshape."""
    with pytest.raises(ValueError, match=r"50x48 px.*patch size 8 px"):
        ImageEncoder(CLASS_TOKEN, (50, 48), patch_size_px=8)
    with pytest.raises(ValueError, match=r"100 is not a multiple of its 3 heads"):
        ImageEncoder(CLASS_TOKEN, (32, 32), width=100)


@pytest.mark.parametrize("name", [CLASS_TOKEN, NO_CLASS_TOKEN, NO_EMBED_CLASS])
def test_positions_are_interpolated_as_timm_does(name: str, tmp_path: Path) -> None:
    """Bug: the grid is transposed, the class position is resampled, or a target of equally many patches is skipped."""
    source = timm.create_model(name, img_size=32, num_classes=7, **SMALL)
    torch.nn.init.normal_(source.pos_embed)
    path = write(source.state_dict(), tmp_path)
    for size in [(48, 24), (64, 16)]:  # 6x3 patches, then 8x2: as many as in 4x4
        encoder = small_encoder(name, size)
        report = load_image_weights(encoder, path)
        n_prefix = source.pos_embed.shape[1] - 16
        expected = resample_abs_pos_embed(source.pos_embed, list(encoder.grid), [4, 4], num_prefix_tokens=n_prefix)
        torch.testing.assert_close(encoder.vit.pos_embed, expected, atol=1e-5, rtol=0)
        assert report.interpolated == ("pos_embed",)
        assert report.unused == ("head.bias", "head.weight")


def test_loaded_weights_give_the_source_model_outputs(tmp_path: Path) -> None:
    """Bug: a tensor stays at its random start although loading reported success."""
    source = timm.create_model(CLASS_TOKEN, img_size=(16, 40), num_classes=7, **SMALL).eval()
    torch.save({"model": source.state_dict()}, f"{tmp_path}/weights.pth")
    encoder = small_encoder(CLASS_TOKEN, (16, 40))
    report = load_image_weights(encoder, f"{tmp_path}/weights.pth")
    image = torch.randn(2, 3, 16, 40)
    torch.testing.assert_close(encoder(image), source.forward_features(image), atol=1e-5, rtol=0)
    assert report.interpolated == report.new == ()
    assert set(report.loaded) == set(encoder.vit.state_dict())


def test_loading_is_strict_and_names_the_keys(tmp_path: Path) -> None:
    """Bug: half a checkpoint is loaded without a word, or the encoder is changed before the error."""
    encoder = small_encoder(CLASS_TOKEN, (32, 32))
    before = {key: value.clone() for key, value in encoder.vit.state_dict().items()}
    state = dict(encoder.vit.state_dict())
    state["norm.wieght"] = state.pop("norm.weight")
    state["blocks.0.attn.qkv.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"missing norm.weight; unused norm.wieght; blocks.0.attn.qkv.bias is \[5\]"):
        load_image_weights(encoder, write(state, tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in encoder.vit.state_dict().items())


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    """Bug: a pickle with code is executed, or a missing or damaged file ends in a library's traceback."""
    encoder = small_encoder(CLASS_TOKEN, (32, 32))
    torch.save({"model": Trap(tmp_path / "executed")}, tmp_path / "code.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    torch.save({"norm.weight": 3}, tmp_path / "number.pt")
    for name in ("code.pt", "cut.safetensors", "number.pt", "absent.pt"):
        with pytest.raises(ValueError, match=name):
            load_image_weights(encoder, str(tmp_path / name))
    assert not (tmp_path / "executed").exists()
