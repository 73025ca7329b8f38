"""What a kind of task puts into a run. `mamo.tasks.registry` lists the kinds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamo.data.loader import SampleDataset
from mamo.models.image_encoder import ImageEncoder
from mamo.reports.pictures import network_pictures
from mamo.tasks.mlim.network import PixelEmbedder
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.samples import GALLERY, select_samples
from mamo.training.loop import Task


class PixelNorm:
    """uint8 [..., 3, H, W] -> float32, standardised with the image encoder's published pixel statistics."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image.float() - self.mean) / self.std


@dataclass(frozen=True, slots=True)
class Trained:
    """A network on `device`, and what it reads with."""

    network: Any
    """A `Mamo` or a `Mlim`, as the kind of task has it."""
    tokenizer: Any
    normalise: PixelNorm
    device: torch.device


def _no_pictures(trained: Trained, rows: int, folder: Path) -> list[tuple[str, str]]:
    return []


def _nothing_to_check() -> None:
    pass


def _nothing_to_begin(folder: Path, new: tuple[str, ...]) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one run, for one config; functions are called only where they are needed.

    A kind is a function (config, tokenizer, stored) -> Parts. `stored` is the folder of a run or a checkpoint where the
    `carried` files lie, None for a new run, which makes them from its training data.
    """

    network: Any
    """A `Mamo` or a `Mlim`."""
    image_encoder: ImageEncoder | PixelEmbedder
    """The network's own: grid and pixel statistics."""
    source: Callable[[], SampleDataset]
    """The training samples."""
    collator: Any
    """[(epoch, sample)] -> a batch: `len`, `to`, `part`, `tensors`, `pin_memory`, `image`, `is_valid`, `skipped` and
    `sample_id` as `PairBatch` has them. Its `seed` is the run's."""
    task: Callable[[PixelNorm], Task]
    """What the loop runs; called once, after the weights that the network starts from."""
    evaluate: Callable[[Trained, Path], dict[str, float]]
    """Percentages of the network (put into eval mode) as the config's `data` and `evaluation` say; the folder is for
    further files, such as a submission."""
    baselines: Callable[[Any], dict[str, float]]
    """A batch of examples -> what each loss is worth to a model that has learned nothing."""
    pictures: Callable[[Trained, int, Path], list[tuple[str, str]]] = _no_pictures
    """(title, HTML fragment) for the report, with about so many rows of each kind; the folder is the one that
    `evaluate` wrote its files to."""
    begin: Callable[[Path, tuple[str, ...]], None] = _nothing_to_begin
    """Called with a checkpoint and the names of the parameters that it lacks, once the others are taken from it."""
    check: Callable[[], object] = _nothing_to_check
    """Reads the files that `evaluate` will, before any work is done; raises as it does."""
    carried: Mapping[str, str] = field(default_factory=dict)
    """Texts by file name that the run's folder and every checkpoint must hold, as the tokenizer."""


def pictures_of(config: PretrainConfig, trained: Trained, rows: int, folder: Path) -> list[tuple[str, str]]:
    """What a network with the heads of pre-training does with test scenes or with the pairs of `data.eval_file`."""
    exhibits = select_samples(config, max(GALLERY, rows))
    if exhibits is None:
        return []
    reading = (trained.tokenizer, trained.normalise, trained.device)
    return network_pictures(trained.network, config, *reading, exhibits, rows)
