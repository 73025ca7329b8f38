import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from mamo.models.image_encoder import ImageEncoder, load_image_weights
from mamo.models.towers import paint_masked

CLASS_TOKEN, NO_CLASS_TOKEN, SIGLIP = (
    "vit_tiny_patch16_224",
    "vit_medium_patch16_gap_240",
    "vit_base_patch16_siglip_224",
)
QUICK_GELU, TANH_GELU = "vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_siglip_256"
NO_EMBED_CLASS, PRE_NORM = "deit3_small_patch16_224", "vit_base_patch32_clip_224"
REGISTERS, ONLY_REGISTERS = "vit_small_patch14_reg4_dinov2", "vit_medium_patch16_reg4_gap_256"
EVA02, DINOV3, PE = "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def small_encoder(name: str, image_size_px: tuple[int, int], **options: Any) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(name, image_size_px, patch_size_px=8, width=32, depth=2, heads=4, **options).eval()
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
    ("name", "num_prefix_tokens"),
    [(CLASS_TOKEN, 1), (NO_CLASS_TOKEN, 0), (SIGLIP, 0), (NO_EMBED_CLASS, 1), (PRE_NORM, 1)],
)
@pytest.mark.parametrize("image_size_px", [(32, 32), (16, 40)])
def test_whole_image_equals_timm(name: str, num_prefix_tokens: int, image_size_px: tuple[int, int]) -> None:
    """Bug: a step of timm's forward is left out or reordered (norm_pre, positions of the class token)."""
    encoder = small_encoder(name, image_size_px)
    image = torch.randn(3, 3, *image_size_px)
    tokens = encoder(image)
    assert encoder.num_prefix_tokens == num_prefix_tokens
    assert encoder.grid == (image_size_px[0] // 8, image_size_px[1] // 8)
    assert tokens.shape == (3, num_prefix_tokens + encoder.grid[0] * encoder.grid[1], encoder.width)
    torch.testing.assert_close(
        tokens, timm_twin(encoder, name, image_size_px).forward_features(image), atol=1e-5, rtol=0
    )


NEWER = [(REGISTERS, 1, 4), (ONLY_REGISTERS, 0, 4), (EVA02, 1, 0), (DINOV3, 1, 4), (PE, 1, 0)]
"""Name, class tokens, registers."""


def without_registers(tokens: Tensor, n_class: int, n_registers: int) -> Tensor:
    return torch.cat([tokens[:, :n_class], tokens[:, n_class + n_registers :]], dim=1)


@pytest.mark.parametrize(("name", "n_class", "n_registers"), NEWER)
@pytest.mark.parametrize("image_size_px", [(32, 32), (16, 40)])
def test_registers_and_rotary_positions_equal_timm(
    name: str, n_class: int, n_registers: int, image_size_px: tuple[int, int]
) -> None:
    """Bug: a register among the patches or missing in the layers, angles of another grid, a norm left out."""
    encoder = small_encoder(name, image_size_px)
    image, n_patches = torch.randn(3, 3, *image_size_px), image_size_px[0] * image_size_px[1] // 64
    twin = timm.create_model(name, img_size=image_size_px, num_classes=0, global_pool="", **SMALL).eval()
    twin.load_state_dict(encoder.vit.state_dict())
    tokens = encoder(image)
    assert (encoder.num_prefix_tokens, encoder.num_registers) == (n_class, n_registers)
    assert tokens.shape == (3, n_class + n_patches, 32)
    expected = without_registers(twin.forward_features(image), n_class, n_registers)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert torch.equal(encoder(image, torch.arange(n_patches).expand(3, -1)), tokens)
    torch.testing.assert_close(encoder.pool(tokens), tokens[:, 0] if n_class else tokens.mean(dim=1))


@pytest.mark.parametrize(("name", "n_class", "n_registers"), NEWER)
def test_visible_patches_keep_registers_and_angles(name: str, n_class: int, n_registers: int) -> None:
    """Bug: a visible patch is rotated by the angle of its place in the row, or the registers are left out with it."""
    encoder = small_encoder(name, (16, 40))
    visible = torch.tensor([[7, 0, 3], [1, 2, 9]])
    twin = timm.create_model(name, img_size=(16, 40), num_classes=0, global_pool="", patch_drop_rate=0.5, **SMALL)
    twin.eval().load_state_dict(encoder.vit.state_dict())

    def keep(tokens: Tensor) -> Any:  # in place of timm's own choice of patches
        rows = torch.arange(2)[:, None]
        kept = torch.cat([tokens[:, : n_class + n_registers], tokens[rows, visible + n_class + n_registers]], dim=1)
        return (kept, visible) if hasattr(twin, "rope") else kept

    del twin.patch_drop
    twin.patch_drop = keep
    image = torch.randn(2, 3, 16, 40)
    expected = without_registers(twin.forward_features(image), n_class, n_registers)
    torch.testing.assert_close(encoder(image, visible), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [SIGLIP, PE])
def test_attention_pooling_equals_timm(name: str, tmp_path: Path) -> None:
    """Bug: the pooling head is left random, or the class token is pooled where timm leaves it out."""
    source = timm.create_model(name, img_size=32, num_classes=7, **SMALL).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder = small_encoder(name, (32, 32), pooling="attention")
    report = load_image_weights(encoder, write(source.state_dict(), tmp_path))
    assert report.unused == ("head.bias", "head.weight")
    image = torch.randn(2, 3, 32, 32)
    expected = source.forward_head(source.forward_features(image), pre_logits=True)
    torch.testing.assert_close(encoder.pool(encoder(image)), expected, atol=1e-5, rtol=1e-5)
    assert encoder.pool(encoder(image)).shape == (2, 32)


@pytest.mark.parametrize("name", [EVA02, DINOV3, PE, REGISTERS])
def test_weights_of_newer_encoders_load_and_positions_follow_the_grid(name: str, tmp_path: Path) -> None:
    """Bug: timm's norm after the mean left random, or absolute positions that are not resampled as timm does."""
    source = timm.create_model(name, img_size=32, num_classes=7, **SMALL).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = write(source.state_dict(), tmp_path)
    for size in [(32, 32), (48, 24)]:
        encoder = small_encoder(name, size)
        report = load_image_weights(encoder, path)
        positions = encoder.position_parameters()
        assert report.interpolated == (("pos_embed",) if positions and size != (32, 32) else ())
        twin = timm.create_model(name, img_size=size, num_classes=7, **SMALL).eval()
        state = dict(source.state_dict())
        if positions:
            n = positions["vit.pos_embed"]
            state["pos_embed"] = resample_abs_pos_embed(
                state["pos_embed"], list(encoder.grid), [4, 4], num_prefix_tokens=n
            )
        twin.load_state_dict(state)
        image = torch.randn(2, 3, *size)
        tokens = twin.forward_features(image)
        if name == EVA02:
            tokens = twin.fc_norm(tokens)
        expected = without_registers(tokens, 1, encoder.num_registers)
        torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=1e-5)


def test_a_convolutional_stem_is_timms(tmp_path: Path) -> None:
    """Bug: another grid, masked pixels that leak through 3 x 3 convolutions, or a stem that is not trained."""
    encoder = small_encoder(CLASS_TOKEN, (32, 48), stem="convolutions")
    assert (encoder.grid, encoder.patch_size_px) == ((4, 6), (8, 8))
    image, visible = torch.randn(2, 3, 32, 48), torch.tensor([[0, 5], [7, 23]])
    stem = encoder.vit.patch_embed.backbone
    convolutions = [module for module in stem.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [module.stride for module in convolutions] == [(2, 2)] * 3 + [(1, 1)]
    patches = image
    for layer in stem:
        patches = layer(patches)
    tokens = torch.cat([encoder.vit.cls_token.expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    expected = encoder.vit.norm(encoder.vit.blocks(tokens + encoder.vit.pos_embed))
    torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=0)
    assert torch.equal(encoder(image, torch.arange(24).expand(2, -1)), encoder(image))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())
    altered = torch.where(paint_masked(torch.ones_like(image), visible, (4, 6), torch.zeros(3)) > 0, image, 9.0)
    assert torch.equal(encoder(altered, visible), encoder(image, visible))
    encoder(image, visible).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in (encoder.mask_colour, *stem.parameters()))


def test_dropout_and_drop_path_reach_the_layers() -> None:
    """Bug: a key that changes nothing, or that changes evaluation."""
    encoder = ImageEncoder(
        CLASS_TOKEN, (16, 16), patch_size_px=8, width=32, depth=3, heads=4, dropout=0.2, drop_path=0.4
    )
    assert {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)} == {0.0, 0.2}
    assert encoder.vit.blocks[1].attn.attn_drop.p == encoder.vit.blocks[1].attn.proj_drop.p == 0.2
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.vit.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    image = torch.randn(2, 3, 16, 16)
    assert not torch.equal(encoder(image), encoder(image))
    encoder.eval()
    assert torch.equal(encoder(image), encoder(image))


@pytest.mark.parametrize("name", [REGISTERS, DINOV3, EVA02])
def test_recorded_attention_has_the_registers(name: str) -> None:
    """Bug: a heat map that is shifted by the registers, or the fused attention that stays off."""
    encoder = small_encoder(name, (16, 40))
    image = torch.randn(2, 3, 16, 40)
    whole = encoder(image)
    with encoder.recording_attention() as weights:
        torch.testing.assert_close(encoder(image), whole, atol=1e-5, rtol=1e-4)
    n_tokens = encoder.num_prefix_tokens + encoder.num_registers + 10
    assert [tuple(w.shape) for w in weights] == [(2, 4, n_tokens, n_tokens)] * 2
    assert all(block.attn.fused_attn for block in encoder.vit.blocks)


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
        if encoder.num_prefix_tokens:
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
        ("vit_small_patch16_rope_mixed_224", "rotary positions are of another kind"),
        ("vit_relpos_small_patch16_224", "RelPos"),
        ("resnet18", "ResNet"),
        ("vit_tiny_r_s16_p8_224", "convolutional"),
        ("deit_tiny_distilled_patch16_224", "distillation"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
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
    for name, options, message in (
        (EVA02, {"width": 30, "heads": 3}, "need a multiple of 4 features a head, not 10"),
        (CLASS_TOKEN, {"pooling": "attention"}, "has no attention pooling; use token"),
        (PE, {"pooling": "attention", "width": 36, "heads": 3}, "not a multiple of the 8 heads"),
        (EVA02, {"stem": "convolutions", "patch_size_px": 16}, "needs a VisionTransformer"),
        (CLASS_TOKEN, {"stem": "convolutions", "patch_size_px": 12}, "with patches of 12 px"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageEncoder(name, (336, 336), **options)
    with pytest.raises(ValueError, match=r"50x48 px.*patch size 8 px"):
        ImageEncoder(CLASS_TOKEN, (50, 48), patch_size_px=8)
    with pytest.raises(ValueError, match=r"100 is not a multiple of its 3 heads"):
        ImageEncoder(CLASS_TOKEN, (32, 32), width=100)


@pytest.mark.parametrize("name", [CLASS_TOKEN, NO_CLASS_TOKEN, NO_EMBED_CLASS])
def test_positions_are_interpolated_as_timm_does(name: str, tmp_path: Path) -> None:
    """Bug: the grid is transposed, or the class position is resampled."""
    source = timm.create_model(name, img_size=32, num_classes=7, **SMALL)
    torch.nn.init.normal_(source.pos_embed)
    path = write(source.state_dict(), tmp_path)
    for size in [(48, 24), (64, 24)]:  # 6 x 3 and 8 x 3 patches
        encoder = small_encoder(name, size)
        report = load_image_weights(encoder, path)
        num_prefix_tokens = source.pos_embed.shape[1] - 16
        expected = resample_abs_pos_embed(
            source.pos_embed, list(encoder.grid), [4, 4], num_prefix_tokens=num_prefix_tokens
        )
        torch.testing.assert_close(encoder.vit.pos_embed, expected, atol=1e-5, rtol=0)
        assert report.interpolated == ("pos_embed",)
        assert report.unused == ("head.bias", "head.weight")


@settings(deadline=None, max_examples=25)
@given(
    old=st.sampled_from([(4, 4), (2, 8), (8, 2), (1, 16), (6, 6), (9, 4), (3, 5), (5, 3)]),
    new=st.sampled_from([(4, 4), (2, 8), (8, 2), (16, 1), (6, 6), (4, 9), (3, 5), (3, 12)]),
)
def test_positions_of_a_file_are_kept_resampled_or_refused(
    old: tuple[int, int], new: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bug: as many patches in another arrangement pass for the same grid, or for a square that the file was not."""
    source, encoder = (small_encoder(CLASS_TOKEN, (8 * rows, 8 * columns)) for rows, columns in (old, new))
    torch.nn.init.normal_(source.vit.pos_embed)
    path = write(source.vit.state_dict(), tmp_path_factory.mktemp("weights"))
    n_patches, side = old[0] * old[1], math.isqrt(old[0] * old[1])
    is_square, is_equal = side * side == n_patches, n_patches == new[0] * new[1]
    if is_square and is_equal and new != (side, side):
        with pytest.raises(ValueError, match=f"may be {side} x {side} patches or this encoder's {new[0]} x {new[1]}"):
            load_image_weights(encoder, path)
        return
    if not is_square and not is_equal:
        with pytest.raises(ValueError, match=r"pos_embed is \["):
            load_image_weights(encoder, path)
        return
    report, stored = load_image_weights(encoder, path), source.vit.pos_embed
    if not report.interpolated:
        assert n_patches == new[0] * new[1]
        assert torch.equal(encoder.vit.pos_embed, stored)
    else:
        expected = resample_abs_pos_embed(stored, list(new), [side, side])
        torch.testing.assert_close(encoder.vit.pos_embed, expected)


@pytest.mark.parametrize("name", [CLASS_TOKEN, "deit_tiny_patch16_224", NO_EMBED_CLASS, PRE_NORM, SIGLIP])
def test_loaded_weights_give_the_source_model_outputs(name: str, tmp_path: Path) -> None:
    """Bug: a tensor stays at its random start although loading reported success."""
    source = timm.create_model(name, img_size=(16, 40), num_classes=7, **SMALL).eval()
    torch.save({"model": source.state_dict()}, f"{tmp_path}/weights.pth")
    encoder = small_encoder(name, (16, 40))
    report = load_image_weights(encoder, f"{tmp_path}/weights.pth")
    image = torch.randn(2, 3, 16, 40)
    torch.testing.assert_close(encoder(image), source.forward_features(image), atol=1e-5, rtol=0)
    assert report.interpolated == report.new == ()
    assert set(report.loaded) == set(encoder.vit.state_dict())


def openai_layout(clip: CLIPModel) -> dict[str, Tensor]:
    """A transformers CLIP under the names of OpenAI's files."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    vision = clip.vision_model
    state = {
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.proj": clip.visual_projection.weight.T,
        "text_projection": clip.text_projection.weight.T,
        "logit_scale": clip.logit_scale,
    }
    for ours, theirs in (("ln_pre", vision.pre_layrnorm), ("ln_post", vision.post_layernorm)):
        state |= {f"visual.{ours}.{key}": value for key, value in theirs.state_dict().items()}
    for k, layer in enumerate(vision.encoder.layers):
        prefix, attention = f"visual.transformer.resblocks.{k}.", layer.self_attn
        for key in ("weight", "bias"):
            parts = [getattr(part, key) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            state[f"{prefix}attn.in_proj_{key}"] = torch.cat(parts)
            state[f"{prefix}attn.out_proj.{key}"] = getattr(attention.out_proj, key)
            for theirs, ours in names.items():
                state[f"{prefix}{ours}.{key}"] = getattr(layer.get_submodule(theirs), key)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


@pytest.fixture
def clip() -> CLIPModel:
    return foreign(CLIPModel, CLIPConfig, hidden_act="quick_gelu")


def foreign(kind: type[PreTrainedModel], config_kind: type, **of_vision: object) -> PreTrainedModel:
    """A small random model of transformers, with an image tower of 4 x 4 patches."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = config_kind(vision_config={**size, "image_size": 32, "patch_size": 8, **of_vision}, text_config=text)
    model = kind(config if kind in (CLIPModel, SiglipModel) else config.vision_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_openais_clip_gives_the_outputs_of_transformers_clip(clip: CLIPModel, tmp_path: Path) -> None:
    """Bug: query, key and value in another order, norms exchanged, another activation, a text tower taken in."""
    encoder = small_encoder(QUICK_GELU, (32, 32))
    report = load_image_weights(encoder, write(openai_layout(clip), tmp_path))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip.vision_model.post_layernorm(clip.vision_model(image).last_hidden_state)
    torch.testing.assert_close(encoder(image), expected, atol=1e-4, rtol=1e-4)
    assert report.unused == ("head.weight", "logit_scale", "text_projection")
    assert report.interpolated == report.new == ()


def test_a_clip_of_another_grid_is_interpolated_and_of_other_patches_refused(clip: CLIPModel, tmp_path: Path) -> None:
    """Bug: positions or patches resampled without a word."""
    state = openai_layout(clip)
    encoder = small_encoder(QUICK_GELU, (48, 24))
    report = load_image_weights(encoder, write(state, tmp_path))
    assert report.interpolated == ("pos_embed",)
    positions = state["visual.positional_embedding"][None]
    expected = resample_abs_pos_embed(positions, [6, 3], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.vit.pos_embed, expected, atol=1e-5, rtol=0)
    state["visual.conv1.weight"] = torch.zeros(32, 3, 16, 16)
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight is \[32, 3, 16, 16\], must be \[32, 3, 8, 8\]"):
        load_image_weights(encoder, write(state, tmp_path))


def test_open_clips_siglip_gives_the_outputs_of_timms(tmp_path: Path) -> None:
    """Bug: the tower under `visual.trunk.` is not found, or its pooling head is loaded over something."""
    source = timm.create_model(SIGLIP, img_size=32, num_classes=0, **SMALL).eval()
    assert source.attn_pool is not None
    state = {f"module.visual.trunk.{key}": value for key, value in source.state_dict().items()}
    state |= {"module.text.token_embedding.weight": torch.zeros(9, 8), "module.logit_bias": torch.zeros(1)}
    encoder = small_encoder(SIGLIP, (32, 32))
    report = load_image_weights(encoder, write(state, tmp_path))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(image), source.forward_features(image), atol=1e-5, rtol=0)
    assert {"logit_bias", "text.token_embedding.weight", "attn_pool.latent"} <= set(report.unused)
    assert not any(key.startswith("attn_pool") for key in report.loaded)
    assert len(report.unused) > 6
    assert str(report).endswith(", ...")


@pytest.mark.parametrize(
    ("name", "kind", "config_kind", "unused"),
    [
        (QUICK_GELU, CLIPVisionModel, CLIPConfig, set()),
        (QUICK_GELU, CLIPModel, CLIPConfig, {"text_projection.weight", "visual_projection.weight", "logit_scale"}),
        (TANH_GELU, SiglipVisionModel, SiglipConfig, {"head.probe"}),
        (TANH_GELU, SiglipModel, SiglipConfig, {"vision_model.head.probe", "logit_bias", "text_model.head.weight"}),
    ],
)
def test_a_folder_of_transformers_gives_its_outputs(
    name: str, kind: type[PreTrainedModel], config_kind: type, unused: set[str], tmp_path: Path
) -> None:
    """Bug: query, key and value in another order, norms exchanged, a layer left random, the names of a tower alone."""
    model = foreign(kind, config_kind)
    model.save_pretrained(tmp_path)
    vision = getattr(model, "vision_model", model)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vision(image).last_hidden_state
        if config_kind is CLIPConfig:  # whose norm follows the pooling alone
            expected = vision.post_layernorm(expected)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        encoder = small_encoder(name, (32, 32))
        report = load_image_weights(encoder, str(source))
        torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=0)
        assert unused <= set(report.unused)
        assert all(key.startswith(("text_", "visual_", "logit_")) or "head." in key for key in report.unused)
        assert report.interpolated == report.new == ()


def test_siglips_pooling_of_transformers_gives_its_outputs(tmp_path: Path) -> None:
    """Bug: query, key and value of the pooling head in another order, or the head left random."""
    model = foreign(SiglipModel, SiglipConfig)
    model.save_pretrained(tmp_path)
    encoder = small_encoder(TANH_GELU, (32, 32), pooling="attention")
    report = load_image_weights(encoder, str(tmp_path))
    assert {"attn_pool.latent", "attn_pool.kv.weight"} <= set(report.loaded)
    assert not any("vision_model" in key for key in report.unused)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(image).pooler_output
    torch.testing.assert_close(encoder.pool(encoder(image)), expected, atol=1e-4, rtol=1e-4)


def test_what_a_folder_of_transformers_says_and_the_encoder_does_not_is_refused(tmp_path: Path) -> None:
    """Bug: other heads, another activation, other patches or half a layer loaded without a word; SigLIP not at all."""
    foreign(CLIPModel, CLIPConfig).save_pretrained(tmp_path / "clip")
    for name, heads, message in (
        (PRE_NORM, 4, "activation 'quick_gelu', the image encoder GELU.*vit_.*_clip_quickgelu_"),
        (QUICK_GELU, 2, "has 4 attention heads, the image encoder has 2: set model.image.heads=4"),
    ):
        encoder = ImageEncoder(name, (32, 32), patch_size_px=8, width=32, depth=2, heads=heads)
        with pytest.raises(ValueError, match=message):
            load_image_weights(encoder, str(tmp_path / "clip"))
    foreign(SiglipModel, SiglipConfig).save_pretrained(tmp_path / "siglip")
    exact = small_encoder(SIGLIP, (48, 24))  # GELU itself: near enough, and what timm runs SigLIP with
    assert load_image_weights(exact, str(tmp_path / "siglip")).interpolated == ("pos_embed",)
    state = load_file(tmp_path / "clip/model.safetensors")
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    state |= {"vision_model.encoder.layers.1.gate": torch.zeros(1), "adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing blocks\.1\.attn\.qkv\.bias; unused") as caught:
        load_image_weights(small_encoder(QUICK_GELU, (32, 32)), write(state, tmp_path))
    for name in ("layers.1.gate", "adapter.weight", "layers.1.self_attn.q_proj.bias", "layers.1.self_attn.v_proj.bias"):
        assert name in str(caught.value)
    assert "blocks.0" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"hidden_act": "none such"}')
    with pytest.raises(ValueError, match=r"config\.json is no config of a CLIP or SigLIP"):
        load_image_weights(small_encoder(QUICK_GELU, (32, 32)), str(tmp_path / "weights.safetensors"))


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


def test_a_model_without_published_weights_is_told() -> None:
    """Bug: timm's RuntimeError, which no script turns into a message."""
    with pytest.raises(ValueError, match="no published weights of vit_small_patch16_36x1_224: name a file"):
        load_image_weights(ImageEncoder("vit_small_patch16_36x1_224", (32, 32)), "timm")
