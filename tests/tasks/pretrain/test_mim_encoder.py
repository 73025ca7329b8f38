"""MIM on the features of a frozen encoder: the right features, never trained, kept with the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import mamo
from mamo.config.schema import RunConfig
from mamo.reports.card import model_card
from mamo.trainer import TrainingRun, train
from tests.tiny import TWO_STEPS, config_of

NAME = "vit_tiny_patch16_224"
SIZES = {"patch_size_px": 4, "width": 24, "depth": 2, "heads": 2}


def published(folder: Path) -> Any:
    """Write the weights of a small ViT under timm's names; return it, for pictures of 8 x 8 px."""
    torch.manual_seed(3)
    options = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = timm.create_model(NAME, img_size=8, num_classes=0, **options).eval()
    folder.mkdir(exist_ok=True)
    save_file(vit.state_dict(), folder / "vit.safetensors")
    return vit


def sections(**encoder: Any) -> dict[str, Any]:
    return {"losses": {"mim_target": "encoder", "mim_encoder": encoder}, "training": TWO_STEPS}


def test_targets_are_the_features_of_a_named_encoder(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: other pictures, pixels, patches or places than the encoder's; a head of another width."""
    vit = published(tmp_path)
    run = TrainingRun(tiny(**sections(name=NAME, weights=str(tmp_path / "vit.safetensors"), **SIZES)))
    batch = run.example_batch(4)
    targets, _ = run.task.compute_targets(batch, 4, 0)
    pixels = (batch.image.float() / 255 - torch.tensor(vit.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(
        vit.pretrained_cfg["std"]
    ).view(3, 1, 1)
    small = functional.interpolate(pixels, (8, 8), mode="bicubic", antialias=True)
    with torch.no_grad():
        features = vit.forward_features(small)[:, 1:]  # [4, 4, 24]
    expected = torch.stack([features[row, batch.masked_patches[row]] for row in range(4)])
    torch.testing.assert_close(targets.views["patch_encoder"], expected, atol=1e-5, rtol=0)
    losses, _ = run.task.losses(batch, targets, 0)
    assert torch.isfinite(losses["mim"])
    assert run.task.network.mim.project[-1].out_features == 24


def test_targets_are_those_of_an_earlier_run(tiny: Callable[..., RunConfig], pretrained: Path, tmp_path: Path) -> None:
    """Bug: the encoder of the run stays random, or is the new network's own."""
    run = TrainingRun(tiny(**sections(checkpoint=str(pretrained))))
    encoder = mamo.load(pretrained).network.backbone.image_encoder
    batch = run.example_batch(4)
    targets, _ = run.task.compute_targets(batch, 4, 0)
    with torch.no_grad():
        features = encoder(batch.image)[:, 1:]
    expected = torch.stack([features[row, batch.masked_patches[row]] for row in range(4)])
    torch.testing.assert_close(targets.views["patch_encoder"], expected, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("no_curves")
def test_the_encoder_is_frozen_and_kept_with_the_run(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: the target drifts, or a resume, an evaluation or an export asks for weights that are gone."""
    published(tmp_path / "source")
    config = tiny(**sections(name=NAME, weights=str(tmp_path / "source" / "vit.safetensors"), **SIZES))
    train(config, is_resume=False)
    last = tmp_path / "run" / "checkpoints" / "step-0000002"
    stored, own = load_file(last / "mim_encoder.safetensors"), load_file(tmp_path / "source" / "vit.safetensors")
    assert all(torch.equal(stored[f"encoder.vit.{name}"], value) for name, value in own.items() if "pos" not in name)
    end = load_file(last / "student.safetensors")
    shutil.rmtree(tmp_path / "source")
    shutil.rmtree(last)
    train(config, is_resume=True)
    again = load_file(last / "student.safetensors")
    assert all(torch.equal(again[name], value) for name, value in end.items())
    model = mamo.load(tmp_path / "run")
    model.save_pretrained(tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "mim_encoder.json").read_text())["image_size_px"] == [8, 8]
    mamo.load(tmp_path / "exported")
    card = model_card(last, config)
    assert f"| MIM target | frozen features: {NAME}, {tmp_path}/source/vit.safetensors |" in card
    assert "| MIM target | frozen features: the image encoder of runs/a |" in model_card(
        last, tiny(**sections(checkpoint="runs/a"))
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NAME, "timm's weights of vit_tiny_patch16_224 are not in the cache, .*: name a file or folder of them"),
        (
            "facebook/dinov2-small",
            "'facebook/dinov2-small' is not a timm model; give timm's name of it, and",
        ),
    ],
)
def test_names_that_cannot_be_fetched_are_named(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """Bug: the hub client's own text, which says nothing of the key, or a name of the hub without a remedy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        TrainingRun(tiny(**sections(name=name, patch_size_px=8)))


def test_what_cannot_be_a_target_is_named(tiny: Callable[..., RunConfig], pretrained: Path) -> None:
    """Bug: patches of one encoder are compared with others of the other, or a target without a source is random."""
    with pytest.raises(ValueError, match=r"mim_encoder: .* has 2 x 2 patches, the network's image encoder 4 x 4"):
        TrainingRun(tiny(**sections(checkpoint=str(pretrained)), model={"image": {"patch_size_px": 4}}))
    for losses, message in (
        ({"mim_target": "encoder"}, r"losses\.mim_encoder: mim_target: encoder needs either its name or a checkpoint"),
        ({"mim_encoder": {"name": NAME}}, r"losses\.mim_encoder: contradicts losses\.mim_target: features"),
        (
            {"mim_target": "encoder", "mim_encoder": {"name": NAME}, "weights": {"mim": 0}},
            "mim_target: encoder contrad",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(losses=losses)
