"""A network that starts from a whole CLIP or SigLIP has its features and its temperature."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mamo
from mamo.config.schema import RunConfig
from mamo.models.build import build_backbone, load_published
from mamo.models.vlm import Mamo
from mamo.trainer import train
from tests.published import HEADS, LAYERS, POSITIONS, WIDTH, save_published
from tests.tiny import config_of

IMAGE = {"patch_size_px": 8, "width": WIDTH, "depth": 2, "heads": 2}
CLIP = {"image": {"name": "vit_base_patch16_clip_quickgelu_224", **IMAGE}, "itc_width": 16}
SIGLIP = {"image": {"name": "vit_base_patch16_siglip_224", **IMAGE}, "itc_width": WIDTH}
LENGTHS = torch.tensor([9, 4])


def started(folder: Path, n_words: int, model: dict[str, Any]) -> Mamo:
    """Build a network with a temperature and the bias of sigmoid contrast, and start it from a folder."""
    config: Any = config_of(model={**model, "clip": str(folder), "dropout": 0.0})
    heads = {name: torch.nn.Parameter(torch.tensor(0.07)) for name in ("temperature", "itc_bias")}
    network = Mamo(build_backbone(config, n_words, 1), heads).eval()
    load_published(config, network)
    return network


def inputs(end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw normalised pictures and texts that end with `end`, also their padding."""
    torch.manual_seed(2)
    is_valid = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]
    ids = torch.randint(3, end - 1, is_valid.shape)
    ids[torch.arange(2), LENGTHS - 1] = end
    return torch.randn(2, 3, 16, 16), ids.masked_fill(~is_valid, end), is_valid


def as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIP of transformers as open_clip does, joining and transposing by hand."""
    found = {"logit_scale": state["logit_scale"]}
    found["text_projection"] = state["text_projection.weight"].t().contiguous()
    found["visual.proj"] = state["visual_projection.weight"].t().contiguous()
    found["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    found["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    found["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    found["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    for ours, theirs in (norms | {"ln_final": "text_model.final_layer_norm"}).items():
        found |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    for side, prefix, layers in (("vision_model", "visual.", 2), ("text_model", "", LAYERS)):
        for index in range(layers):
            old, new = f"{side}.encoder.layers.{index}.", f"{prefix}transformer.resblocks.{index}."
            for kind in ("weight", "bias"):
                parts = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
                found[f"{new}attn.out_proj.{kind}"] = state[f"{old}self_attn.out_proj.{kind}"]
                for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1")):
                    found[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"]
                found[f"{new}mlp.c_proj.{kind}"] = state[f"{old}mlp.fc2.{kind}"]
    return found


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_a_clip_gives_its_features_and_temperature(layout: str, tmp_path: Path) -> None:
    """Bug: a projection is transposed or has a bias, a tower or the temperature stays random."""
    model = save_published("clip", tmp_path / "clip")
    folder, n_words = tmp_path / "clip", model.config.text_config.vocab_size
    if layout == "open_clip":
        folder = tmp_path / "open_clip"
        folder.mkdir()
        save_file(as_open_clip(dict(model.state_dict())), folder / "open_clip_model.safetensors")
        text = {"context_length": POSITIONS, "vocab_size": n_words, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
        values = {"embed_dim": 16, "quick_gelu": True, "text_cfg": {**text, "mlp_ratio": 1.5}, "vision_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    network = started(folder, n_words + 1, CLIP)
    pixels, ids, is_valid = inputs(n_words - 1)
    backbone = network.backbone
    with torch.no_grad():
        theirs = model(ids, pixels, attention_mask=is_valid.long())
        image = backbone.image_feature(backbone.image_encoder(pixels))
        text_feature = backbone.text_feature(backbone.text_encoder(ids, is_valid))
    torch.testing.assert_close(image, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_feature, theirs.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(image @ text_feature.T / network.temperature, theirs.logits_per_image, atol=1e-4, rtol=0)


def test_a_siglip_gives_its_text_feature_temperature_and_bias(tmp_path: Path) -> None:
    """Bug: SigLIP's projection, temperature or bias stays random, or its text is read from the start of a CLIP's."""
    model = save_published("siglip", tmp_path)
    n_words = model.config.text_config.vocab_size
    network = started(tmp_path, n_words + 2, SIGLIP)
    _, ids, is_valid = inputs(n_words - 1)
    ids = ids.masked_fill(~is_valid, 1)
    whole = torch.full((2, POSITIONS), 1)
    whole[:, : ids.shape[1] - 1] = ids[:, 1:]
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(model.text_model(whole).pooler_output, dim=-1)
        feature = network.backbone.text_feature(network.backbone.text_encoder(ids, is_valid))
    torch.testing.assert_close(feature, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(1 / network.temperature, model.logit_scale.exp().squeeze())
    torch.testing.assert_close(network.get_head("itc_bias"), model.logit_bias.squeeze())


def test_a_siglip_gives_its_image_feature(tmp_path: Path) -> None:
    """Bug: the head that pools by attention stays random, or a projection that SigLIP lacks follows it.

    timm's towers have the exact GELU, transformers' the one by tanh; with the same the features are the same.
    """
    model = save_published("siglip", tmp_path)
    image = {**SIGLIP["image"], "pooling": "attention"}
    network = started(tmp_path, model.config.text_config.vocab_size + 2, {**SIGLIP, "image": image})
    pixels, _, _ = inputs(9)
    with torch.no_grad():
        feature = network.backbone.image_feature(network.backbone.image_encoder(pixels))
        by_tanh = torch.nn.functional.normalize(model.vision_model(pixels).pooler_output, dim=-1)
        for module in model.vision_model.modules():
            if hasattr(module, "activation_fn"):
                module.activation_fn = torch.nn.GELU()
        theirs = torch.nn.functional.normalize(model.vision_model(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(feature, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(feature, by_tanh, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("no_curves")
def test_a_frozen_clip_gets_a_new_fusion(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a frozen pair of towers moves, or the fusion between them does not."""
    save_published("clip", tmp_path / "source")
    frozen = {"image": {"freeze": "all"}, "text": {"freeze": "all"}}
    training = {"total_steps": 2, "checkpoint_every_steps": 1, "warmup_steps": 0, "parts": frozen}
    data = {"tokenizer": str(tmp_path / "source"), "text_max_tokens": 32}
    train(tiny(model={**CLIP, "clip": str(tmp_path / "source")}, data=data, training=training), is_resume=False)
    before, after = (load_file(tmp_path / f"run/checkpoints/step-000000{step}/student.safetensors") for step in (1, 2))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in moved if ".image_encoder." in f".{name}" or ".text_encoder." in f".{name}"}
    assert {name for name in moved if ".fusion." in f".{name}"}
    published = load_file(tmp_path / "source/model.safetensors")["text_model.embeddings.token_embedding.weight"]
    own = [value for name, value in after.items() if value.ndim == 2 and len(value) == len(published) + 1]
    assert any(torch.equal(value[:-1], published) for value in own)  # the last row is [MASK]


def test_what_contradicts_a_clip_is_named(tmp_path: Path) -> None:
    """Bug: a width that does not fit is found by a list of tensors; two sources of one tower, the last wins."""
    model = save_published("clip", tmp_path)
    with pytest.raises(ValueError, match=r"projection of .* is \[16, 32\], here \[24, 32\]; set model\.itc_width=16"):
        started(tmp_path, model.config.text_config.vocab_size, {**CLIP, "itc_width": 24})
    with pytest.raises(ValueError, match=r"model\.image\.weights: contradicts model\.clip"):
        config_of(model={"clip": "x", "image": {"weights": "timm"}})


@pytest.mark.usefixtures("no_curves")
def test_a_run_from_a_clip_needs_it_only_once(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: evaluation, export or resume of a run asks for the CLIP that it started from."""
    save_published("clip", tmp_path / "source")
    data = {"tokenizer": str(tmp_path / "source"), "text_max_tokens": 32}
    training = {"total_steps": 2, "checkpoint_every_steps": 1, "warmup_steps": 1}
    config = tiny(model={**CLIP, "clip": str(tmp_path / "source")}, data=data, training=training)
    train(config, is_resume=False)
    (tmp_path / "source").rename(tmp_path / "gone")
    model = mamo.load(tmp_path / "run")
    expected = model.encode_text(["a red circle"])
    model.save_pretrained(tmp_path / "exported")
    assert torch.equal(mamo.load(tmp_path / "exported").encode_text(["a red circle"]), expected)
    train(config, is_resume=True)
