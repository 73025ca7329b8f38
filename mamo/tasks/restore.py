"""Restore a task and its network from a folder of weights."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from mamo.config.schema import MamoConfig, MamoModelConfig, RunConfig
from mamo.data.processor import Processor, has_sep
from mamo.data.tokenizer import read_tokenizer
from mamo.evaluation.predictor import Predictor
from mamo.imports import no_code_from
from mamo.models.build import build_backbone, position_resamplers
from mamo.models.vlm import Backbone
from mamo.tasks.base import Task
from mamo.tasks.registry import build_task, load_stored_config
from mamo.training import checkpoint
from mamo.training.run_dir import BERT, CONFIG

Config = TypeVar("Config", bound=RunConfig)


def restore_task(
    folder: Path,
    config: RunConfig,
    device: torch.device,
    weights: str = "student",
    tokenizer: str = "tokenizer",
    words: PreTrainedTokenizerFast | None = None,
) -> tuple[Task, Predictor]:
    """Build the task of a step folder and load its student, in eval mode.

    Args:
        folder: a verified step folder (`checkpoint.resolve`).
        config: the folder's own, or one that differs in `data` and `evaluation` only (positions follow the image
            size). Published weights and configurations that it names are not fetched: the folder holds them.
        device: where the network goes.
        weights, tokenizer: names within the folder, as they are in a step folder.
        words: a tokenizer in place of the folder's, with the same vocabulary.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the config.
    """
    words = words or read_tokenizer(str(folder / tokenizer), has_sep(config))
    with no_code_from(folder):
        task = build_task(without_published(config, folder), words, folder)
    stored = load_stored_config(folder) if (folder / CONFIG).is_file() else config
    resamplers = position_resamplers(task.network, stored.data.image_size)
    checkpoint.load_transfer(folder, weights, task.network, strict_prefix="", resample=resamplers)
    if config.evaluation.network == "teacher" and weights == "student":
        load_averaged(folder, task.network.backbone, stored)
    return task, Predictor(task.network.to(device).eval(), Processor.of(words, config), device)


def load_averaged(folder: Path, backbone: nn.Module, stored: RunConfig) -> None:
    """Load the teacher's backbone of a step folder, whose config is `stored`, into a network's.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    if not (folder / "teacher.safetensors").is_file():
        raise checkpoint.CheckpointError(f"evaluation.network: {folder} has no teacher; use student")
    module = nn.ModuleDict({"module": backbone})
    resamplers = position_resamplers(module, stored.data.image_size)
    checkpoint.load_transfer(folder, "teacher", module, strict_prefix="module.", resample=resamplers)


def random_backbone(config: MamoConfig, folder: Path, n_tokens: int, pad_token_id: int) -> Backbone:
    """Build the backbone of a step folder with the random weights of its seed; see `restore_task` for the config."""
    with no_code_from(folder):
        return build_backbone(without_published(config, folder), n_tokens, pad_token_id)


def without_published(config: Config, folder: Path) -> Config:
    """Return the config to build a stored network by: weights, and the values of a named text encoder, are in `folder`.

    Published weights and configurations are not looked for again: their source may be gone.
    """
    text = config.model.text.model_copy(update={"weights": "random"})
    source, update = config.model.text_source, dict[str, object]()
    if source is not None:
        text = text.model_copy(update={"bert": str(folder / BERT) if (folder / BERT).is_dir() else source})
    update["text"] = text
    if isinstance(config.model, MamoModelConfig):
        update["clip"] = None
        update["image"] = config.model.image.model_copy(update={"weights": "random"})
    return config.model_copy(update={"model": config.model.model_copy(update=update)})
