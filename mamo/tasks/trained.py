"""A trained network from its checkpoint folder alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamo.config import Config
from mamo.data.tokenizer import load_tokenizer
from mamo.models.vlm import Mamo
from mamo.tasks.build import build_network
from mamo.tasks.pretrain import PixelNorm
from mamo.training import checkpoint


@dataclass(frozen=True, slots=True)
class Trained:
    """A network in eval mode on `device`, and what it reads with."""

    network: Mamo
    tokenizer: Any
    normalise: PixelNorm
    device: torch.device


def load_trained(folder: Path, config: Config, device: torch.device) -> Trained:
    """The student of a step folder.

    Args:
        folder: a verified step folder (`checkpoint.resolve`).
        config: the folder's own, or one that differs in `data` and `evaluation` alone. Published weights that it
            names are not fetched: the checkpoint holds all of them.
        device: where the network goes.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the config.
    """
    model = config.model
    plain = model.model_copy(
        update={
            "image": model.image.model_copy(update={"weights": "random"}),
            "text": model.text.model_copy(update={"weights": "random"}),
        }
    )
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    network = build_network(config.model_copy(update={"model": plain}), len(tokenizer), tokenizer.pad_token_id)
    checkpoint.load_module(folder, "student", network)
    encoder = network.backbone.image_encoder
    return Trained(network.to(device).eval(), tokenizer, PixelNorm(encoder.mean, encoder.std, device), device)
