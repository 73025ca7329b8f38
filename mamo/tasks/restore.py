"""A trained network from its checkpoint folder alone."""

from pathlib import Path

import torch

from mamo.config.schema import MamoConfig, MamoModelConfig, RunConfig
from mamo.data.tokenizer import read_tokenizer
from mamo.models.build import position_resamplers
from mamo.tasks.base import Parts, PixelNorm, Trained
from mamo.tasks.registry import load_config, parts_of
from mamo.training import checkpoint
from mamo.training.run_dir import BERT, CONFIG


def load_trained(folder: Path, config: RunConfig, device: torch.device) -> Trained:
    """The student of a step folder, in eval mode; arguments and errors as `load_parts`."""
    trained, _ = load_parts(folder, config, device)
    return trained


def load_mamo(folder: Path, config: RunConfig, device: torch.device) -> tuple[Trained, Parts]:
    """`load_parts` of a MAMO alone; raises CheckpointError for an MLIM too."""
    if not isinstance(config, MamoConfig):
        raise checkpoint.CheckpointError(
            f"{folder} is an MLIM (task {config.task}), which only `scripts/finetune.py` and `scripts/evaluate.py` read"
        )
    return load_parts(folder, config, device)


def load_parts(
    folder: Path, config: RunConfig, device: torch.device, weights: str = "student", tokenizer: str = "tokenizer"
) -> tuple[Trained, Parts]:
    """The student of a step folder, in eval mode, and the parts of its kind of task.

    Args:
        folder: a verified step folder (`checkpoint.resolve`).
        config: the folder's own, or one that differs in `data` and `evaluation` alone (positions follow the image
            size). Published weights and configurations that it names are not fetched: the folder holds them.
        device: where the network goes.
        weights, tokenizer: names within the folder, as they are in a step folder.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the config.
    """
    words = read_tokenizer(str(folder / tokenizer))
    parts = parts_of(without_published(config, folder), words, folder)
    stored = load_config(folder / CONFIG) if (folder / CONFIG).is_file() else config
    resamplers = position_resamplers(parts.network, stored.data.image_size)
    checkpoint.load_transfer(folder, weights, parts.network, heads=(), resample=resamplers)
    normalise = PixelNorm(parts.image_encoder.mean, parts.image_encoder.std, device)
    return Trained(parts.network.to(device).eval(), words, normalise, device), parts


def without_published(config: RunConfig, folder: Path) -> RunConfig:
    """The config to build a stored network by: its weights come from `folder`, and so do the values of a named BERT.

    Published weights and configurations are not looked for again: where they came from may be gone.
    """
    text = config.model.text.model_copy(update={"weights": "random"})
    if text.bert is not None and (folder / BERT).is_dir():
        text = text.model_copy(update={"bert": str(folder / BERT)})
    update: dict[str, object] = {"text": text}
    if isinstance(config.model, MamoModelConfig):
        update["image"] = config.model.image.model_copy(update={"weights": "random"})
    return config.model_copy(update={"model": config.model.model_copy(update=update)})
