"""The frozen image encoder of `losses.mim_target: encoder`: a published one, or the one of an earlier run."""

import json
import logging
from pathlib import Path
from typing import Any

import timm
import torch

from mamo.config.images import ImageEncoderConfig
from mamo.config.values import read_values
from mamo.imports import is_import_path
from mamo.models.build import build_image_encoder, load_image_encoder
from mamo.models.frozen_encoder import FrozenEncoder, check_grid
from mamo.models.stage_encoder import has_stages
from mamo.models.timm_models import meta_model
from mamo.models.towers import ImageTower
from mamo.models.weights import check_keys
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.training import checkpoint
from mamo.training.run_dir import CONFIG

logger = logging.getLogger(__name__)

ASSET = "mim_encoder.json"
"""File of a run, a checkpoint or an export: the encoder's configuration, whose source may be gone."""
_STUDENT = "backbone.image_encoder."


def make_mim_encoder(
    config: PretrainConfig, student: ImageTower, stored: Path | None = None
) -> tuple[FrozenEncoder, str]:
    """Build the encoder of `losses.mim_encoder`, and load its weights unless `stored` keeps them.

    Args:
        config: of the run.
        student: the network's image encoder, which has as many patches.
        stored: folder of a run, checkpoint or export that has `ASSET`; its weights are loaded with the checkpoint.

    Returns:
        The encoder, and the text of `ASSET`.

    Raises:
        ValueError: it has another grid of patches, or there are no such weights.
        CheckpointError: the run that it is taken from cannot be read.
    """
    mim_encoder = config.losses.mim_encoder
    if stored is not None and (stored / ASSET).is_file():
        values = json.loads((stored / ASSET).read_text("utf-8"))
        image, size = ImageEncoderConfig.model_validate(values["image"]), (*values["image_size_px"],)
        return FrozenEncoder(_build(config, image, size), size), json.dumps(values)
    if mim_encoder.checkpoint is not None:
        folder = checkpoint.resolve(Path(mim_encoder.checkpoint))
        image, size = _image_of_run(folder)
        encoder = _build(config, image, size)
        tensors = checkpoint.read_tensors(folder, "student")
        found = {name.removeprefix(_STUDENT): value for name, value in tensors.items() if name.startswith(_STUDENT)}
        check_keys(found, encoder.state_dict(), str(folder))
        encoder.load_state_dict(found)
        logger.info("mim_encoder: the image encoder of %s", folder)
    else:
        image = ImageEncoderConfig(
            name=str(mim_encoder.name),
            patch_size_px=mim_encoder.patch_size_px,
            width=mim_encoder.width,
            depth=mim_encoder.depth,
            heads=mim_encoder.heads,
        )
        patch = (mim_encoder.patch_size_px,) * 2 if mim_encoder.patch_size_px else _patch_size_px(image.name)
        size = (student.grid[0] * patch[0], student.grid[1] * patch[1]) if patch else config.data.image_size
        encoder = _build(config, image, size)
        source = Path(str(mim_encoder.weights))
        if source.is_dir() and (source / "state.json").is_file():
            raise ValueError(f"losses.mim_encoder.weights: {source} is a checkpoint; use losses.mim_encoder.checkpoint")
        report = load_image_encoder(encoder, mim_encoder.weights)
        logger.info("mim_encoder from %s: %s", mim_encoder.weights, report)
    check_grid(encoder, student, mim_encoder.checkpoint or str(mim_encoder.name))
    asset = {"image": image.model_dump(mode="json"), "image_size_px": [*size]}
    return FrozenEncoder(encoder, size), json.dumps(asset)


def _build(config: PretrainConfig, image: ImageEncoderConfig, size: tuple[int, int]) -> ImageTower:
    """Build an image encoder of random weights; the run's own random numbers are not used up."""
    model = config.model.model_copy(update={"image": image})
    data = config.data.model_copy(update={"image_size_px": [*size]})
    with torch.random.fork_rng(devices=[]):
        return build_image_encoder(config.model_copy(update={"model": model, "data": data}))


def _image_of_run(folder: Path) -> tuple[ImageEncoderConfig, tuple[int, int]]:
    """Read the image encoder's configuration and image size from the config of a step folder."""
    values = read_values(folder / CONFIG)
    if "image" not in values["model"]:
        raise ValueError(f"losses.mim_encoder.checkpoint: {folder} has no image encoder of its own; name another run")
    image = ImageEncoderConfig.model_validate({**values["model"]["image"], "weights": "random"})
    side = values["data"]["image_size_px"]
    return image, (side, side) if isinstance(side, int) else (side[0], side[1])


def _patch_size_px(name: str) -> tuple[int, int] | None:
    """Return height and width of a timm model's patches; None for one without patches, or a tower from outside."""
    if is_import_path(name) or not timm.is_model(name):
        return None
    if has_stages(name):
        stride = meta_model(name).feature_info[-1]["reduction"]
        return stride, stride
    patches: Any = getattr(meta_model(name), "patch_embed", None)
    found = getattr(patches, "patch_size", None)
    return None if found is None else (int(found[0]), int(found[1]))
