"""Configs, networks and predictors small enough for a test: a training step takes some hundredths of a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import BertConfig

from mamo.config.schema import RunConfig
from mamo.config.values import merge
from mamo.data.processor import Processor
from mamo.evaluation.predictor import Predictor
from mamo.models.fusion import Fusion
from mamo.models.image_encoder import ImageEncoder
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Backbone, Mamo
from mamo.tasks.pretrain.losses import LOSSES
from mamo.tasks.registry import build_config
from mamo.world.vocabulary import scenes_tokenizer

Values = dict[str, Any]
IMAGE_SIZE_PX = (16, 16)
ITC_AND_ITM = {"mlm": 0, "mim": 0, "mrm_image": 0, "mrm_text": 0}
"""Weights that leave ITC and ITM."""
TWO_STEPS = {"total_steps": 2, "checkpoint_every_steps": 1, "warmup_steps": 1}

_TEXT = {"width": 32, "heads": 2, "mlp_width": 64, "layers": 1}
_MAMO = {
    "image": {"width": 32, "depth": 1, "heads": 2, "patch_size_px": 8},
    "text": _TEXT,
    "fusion_layers": 1,
    "itc_width": 16,
    "dropout": 0.1,
}
_MLIM = {"text": _TEXT, "embedder_layers": 3, "dropout": 0.1}
_RUN = {
    "seed": 3,
    "data": {"train_scenes": 50, "image_size_px": 16, "text_max_tokens": 24, "workers": 0},  # 6.25 batches an epoch
    "training": {
        "total_steps": 30,
        "batch_size_global": 8,
        "warmup_steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "checkpoint_every_steps": 5,
    },
    "evaluation": {"enabled": False},
}
TASKS: Mapping[str, Values] = {
    "pretrain": {"losses": {"queue_size": 24, "itm_pool_size": 4}},
    "grounding": {"losses": {"weights": ITC_AND_ITM, "itm_pool_size": 4}},
    "vqa": {"vqa": {"answer_min_count": 1}},
    "reasoning": {},
    "entailment": {},
    "mlim": {
        "masking": {"image_ratio": 0.8, "text_ratio": 0.8},
        "losses": {"weights": {"itm": 1, "mlm": 1, "recon": 1}, "itm_pool_size": 4},
    },
    "matching": {},
}
"""Each task's own sections."""


def values_of(task: str = "pretrain", **over: Any) -> Values:
    """Return the values of a run of a task from random weights; sections in `over` are merged."""
    model = _MLIM if task in ("mlim", "matching") else _MAMO
    return merge({**_RUN, "task": task, "model": model, "output_dir": "unused", **TASKS[task]}, over)


def config_of(task: str = "pretrain", **over: Any) -> RunConfig:
    """Return the same as a validated config."""
    return build_config(values_of(task, **over))


def finetuning_values(task: str, **over: Any) -> Values:
    """Return the values of a run of two steps that starts from a checkpoint, which gives the model."""
    training = {**_RUN["training"], **TWO_STEPS}
    data = {"train_scenes": 20, "workers": 0}
    sections = {"data": data, "training": training, "evaluation": {"enabled": False}, **TASKS[task]}
    return merge({"task": task, "output_dir": "unused", **sections}, over)


def write_config(path: Path, values: Values) -> Path:
    """Write values as a config file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def spread_weights(*modules: nn.Module, std: float = 0.3, least_ndim: int = 0) -> None:
    """Draw weights far from the small start, where all scores are nearly equal."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim >= least_ndim:
                nn.init.normal_(parameter, std=std)


def make_backbone(width: int = 16, fusion_layers: int = 2, dropout: float = 0.0) -> Backbone:
    """Build encoders and fusion for images of 16 px in patches of 8 px, with the vocabulary of the scenes."""
    torch.manual_seed(0)
    image_encoder = ImageEncoder("vit_tiny_patch16_224", IMAGE_SIZE_PX, patch_size_px=8, width=width, depth=1, heads=2)
    bert = BertConfig(
        vocab_size=len(scenes_tokenizer()),
        hidden_size=width,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=48,
    )
    fusion = Fusion(
        width,
        fusion_layers,
        2,
        2 * width,
        image_width=width,
        grid=image_encoder.grid,
        num_prefix_tokens=image_encoder.num_prefix_tokens,
        text_width=width,
        dropout=dropout,
    )
    return Backbone(image_encoder, TextEncoder(bert, 1), fusion, itc_width=8)


def make_network(backbone: Backbone, *losses: str, mim_head_blocks: int = 0) -> Mamo:
    """Build a network with the heads of some losses of pre-training."""
    config = config_of(model={"mim_head_blocks": mim_head_blocks})
    heads = [kind(config).heads(backbone) for kind in LOSSES if kind.name in losses]
    return Mamo(backbone, {name: head for found in heads for name, head in found.items()})


def predictor_of(network: Any, text_max_tokens: int = 48) -> Predictor:
    """Return a network with the tokenizer of the scenes, on the CPU."""
    return Predictor(network, Processor(scenes_tokenizer(), IMAGE_SIZE_PX, text_max_tokens), torch.device("cpu"))
