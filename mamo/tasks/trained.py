"""A trained network from its checkpoint folder alone."""

from pathlib import Path

import torch

from mamo.config import Config, load_config
from mamo.contradictions import MLIM_TASKS
from mamo.data.tokenizer import load_tokenizer
from mamo.tasks.build import position_resamplers, without_published
from mamo.tasks.kinds import parts_of
from mamo.tasks.parts import Parts, PixelNorm, Trained
from mamo.training import checkpoint
from mamo.training.run_folder import CONFIG


def load_trained(folder: Path, config: Config, device: torch.device) -> Trained:
    """The student of a step folder, in eval mode; arguments and errors as `load_parts`."""
    trained, _ = load_parts(folder, config, device)
    return trained


def load_mamo(folder: Path, config: Config, device: torch.device) -> tuple[Trained, Parts]:
    """`load_parts` of a MAMO alone; raises CheckpointError for an MLIM too."""
    if config.task in MLIM_TASKS:
        raise checkpoint.CheckpointError(
            f"{folder} is an MLIM (task {config.task}), which only `scripts/finetune.py` and `scripts/evaluate.py` read"
        )
    return load_parts(folder, config, device)


def load_parts(
    folder: Path, config: Config, device: torch.device, weights: str = "student", tokenizer: str = "tokenizer"
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
    words = load_tokenizer(str(folder / tokenizer))
    parts = parts_of(without_published(config, folder), words, folder)
    stored = load_config(folder / CONFIG) if (folder / CONFIG).is_file() else config
    resamplers = position_resamplers(parts.network, stored.data.image_size)
    checkpoint.load_transfer(folder, weights, parts.network, heads=(), resample=resamplers)
    normalise = PixelNorm(parts.image_encoder.mean, parts.image_encoder.std, device)
    return Trained(parts.network.to(device).eval(), words, normalise, device), parts
