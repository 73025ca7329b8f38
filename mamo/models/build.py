"""Build the backbone from a configuration, and load published weights into a network."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import PretrainedConfig

from mamo.config.schema import MamoConfig
from mamo.config.values import Values
from mamo.imports import import_class, is_import_path, validate_settings
from mamo.models.clip_start import load_clip
from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion, FusionEncoder
from mamo.models.image_encoder import ImageEncoder, load_image_weights
from mamo.models.published_text import (
    build_text_tower,
    fusion_sizes,
    load_text_weights,
    refused_sizes,
    text_config_of,
)
from mamo.models.stage_encoder import StageEncoder, has_stages, load_stage_weights
from mamo.models.text_encoder import PublishedTextTower
from mamo.models.towers import ImageTower, TextTower
from mamo.models.vlm import Backbone, Mamo
from mamo.models.weights import WeightReport

logger = logging.getLogger(__name__)


def build_backbone(config: MamoConfig, vocabulary_size: int, pad_token_id: int) -> Backbone:
    """Build the part of the network that all tasks share, initialised from `seed`."""
    torch.manual_seed(config.seed)
    image_encoder = build_image_encoder(config)
    published = text_config_of(config, vocabulary_size, pad_token_id)
    text_encoder = _text_encoder(config, published, vocabulary_size, pad_token_id)
    fusion = _fusion(config, image_encoder, text_encoder, published)
    return Backbone(image_encoder, text_encoder, fusion, config.model.itc_width)


def build_image_encoder(config: MamoConfig) -> ImageTower:
    """Build the image encoder of a config, with random weights."""
    image_encoder = _image_encoder(config)
    if config.model.image.pixel_statistics == "clip":
        image_encoder.use_statistics(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    return image_encoder


def _image_encoder(config: MamoConfig) -> ImageTower:
    image = config.model.image
    for key in ("pooling", "stem"):
        is_set = getattr(image, key) != type(image).model_fields[key].default
        if is_set and (is_import_path(image.name) or has_stages(image.name)):
            raise ValueError(f"model.image.{key}: {image.name!r} has no {getattr(image, key)}; remove it")
    if is_import_path(image.name):
        tower: Any = import_class(image.name, ImageTower, "model.image.name")
        settings = validate_settings(tower.settings_type, image.settings, "model.image.settings")
        built: ImageTower = tower(image, config.data.image_size, settings)
        return built
    if image.settings:
        raise ValueError("model.image.settings: only for a tower named by its import path in model.image.name")
    sizes: Values = {key: getattr(image, key) for key in ("patch_size_px", "width", "depth", "heads")}
    sizes |= {"dropout": image.dropout, "drop_path": image.drop_path}
    if not has_stages(image.name):
        return ImageEncoder(image.name, config.data.image_size, **sizes, pooling=image.pooling, stem=image.stem)
    return StageEncoder(image.name, config.data.image_size, **sizes)


def _text_encoder(
    config: MamoConfig, published: PretrainedConfig, vocabulary_size: int, pad_token_id: int
) -> TextTower:
    text = config.model.text
    if text.name is None:
        with refused_sizes(config.model.text_source):
            return build_text_tower(published, text.layers)
    if not is_import_path(text.name):
        raise ValueError(f"model.text.name: {text.name!r} is no import path, module:Class; use null for BERT")
    tower: Any = import_class(text.name, TextTower, "model.text.name")
    settings = validate_settings(tower.settings_type, text.settings, "model.text.settings")
    built: TextTower = tower(text, vocabulary_size, config.data.text_max_tokens, pad_token_id, settings)
    return built


def load_published(config: MamoConfig, network: Mamo) -> None:
    """Load the published weights that `model` names, if any, into a network.

    Raises:
        ValueError: the tower cannot load them, or they do not fit it.
    """
    model, backbone = config.model, network.backbone
    image_encoder, text_encoder = backbone.image_encoder, backbone.text_encoder
    if model.clip is not None:
        logger.info("both towers from %s, the fusion anew: %s", model.clip, load_clip(network, model.clip))
    if model.image.weights != "random":
        report = load_image_encoder(image_encoder, model.image.weights)
        logger.info("image encoder from %s: %s", model.image.weights, report)
    if model.text.weights == "bert" and model.text.bert is not None:
        if not isinstance(text_encoder, PublishedTextTower):
            raise ValueError(f"model.text.weights: {type(text_encoder).__name__} loads none; use random")
        report = load_text_weights(text_encoder, backbone.fusion, model.text.bert, network.get_head("mlm"))
        logger.info("text encoder and fusion from %s: %s", model.text.bert, report)


def load_image_encoder(image_encoder: ImageTower, source: str) -> WeightReport:
    """Load published weights into an image encoder. Raises ValueError where it loads none, or they do not fit."""
    if isinstance(image_encoder, StageEncoder):
        return load_stage_weights(image_encoder, source)
    if not isinstance(image_encoder, ImageEncoder):
        raise ValueError(f"model.image.weights: {type(image_encoder).__name__} loads none; use random")
    return load_image_weights(image_encoder, source)


def _fusion(
    config: MamoConfig, image_encoder: ImageTower, text_encoder: TextTower, published: PretrainedConfig
) -> FusionEncoder:
    """Build the fusion of a config, as wide as BERT, so that its layers can be BERT's upper ones."""
    sizes: Values = {
        **fusion_sizes(published),
        "layers": config.model.fusion_layers,
        "image_width": image_encoder.width,
        "grid": image_encoder.grid,
        "num_prefix_tokens": image_encoder.num_prefix_tokens,
        "dropout": config.model.dropout,
    }
    if config.model.fusion_type == "concat":
        return Fusion(**sizes, text_width=text_encoder.width)
    if text_encoder.width != sizes["width"]:
        raise ValueError(
            f"model.fusion_type: cross needs a text tower of its width {sizes['width']}, this one has "
            f"{text_encoder.width}; use concat, or model.text.width"
        )
    return CrossFusion(**sizes)


def position_resamplers(module: nn.Module, old_image_size_px: tuple[int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions that resample stored position embeddings to a network's grid, by parameter name.

    The resampling is bicubic and leaves class tokens unchanged (as timm and MAE do). Grids are compared by rows and
    columns: 9 x 16 patches are as many as 12 x 12, and at other places.

    Args:
        module: a network in which one part has patches (`grid`, `patch_size_px`). The parts with positions on its grid
            name them with `position_parameters`, and a tower relative ones with `resample_positions`.
        old_image_size_px: height and width of the images that the stored positions are for.

    Returns:
        Nothing where the grid is the same. A function returns a tensor unchanged that has not the old grid's positions.
    """
    parts = dict(module.named_modules())
    (encoder,) = (part for part in parts.values() if hasattr(part, "patch_size_px"))
    old_grid = tuple(side // patch for side, patch in zip(old_image_size_px, encoder.patch_size_px))
    if old_grid == tuple(encoder.grid):
        return {}
    relative = {
        f"{name}.{parameter}": function
        for name, part in parts.items()
        if isinstance(part, ImageTower)
        for parameter, function in part.resample_positions().items()
    }
    return relative | {
        f"{name}.{parameter}": functools.partial(
            _resample, new_grid=tuple(encoder.grid), old_grid=old_grid, num_prefix_tokens=num_prefix_tokens
        )
        for name, part in parts.items()
        if hasattr(part, "position_parameters")
        for parameter, num_prefix_tokens in part.position_parameters().items()
    }


def _resample(stored: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Resample positions [1, N + P, D] of the old grid; return those of another number of patches unchanged."""
    if stored.ndim != 3 or stored.shape[1] != num_prefix_tokens + old_grid[0] * old_grid[1]:
        return stored
    resampled: Tensor = resample_abs_pos_embed(
        stored, new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=num_prefix_tokens
    )
    return resampled
