"""Config of weakly-supervised grounding."""

from typing import ClassVar, Literal

from mamo.config.schema import LossConfig
from mamo.tasks.pretrain.config import PretrainConfig


class GroundingLossConfig(LossConfig):
    """The losses of pre-training, with the negatives that records of grounding have."""

    itm_negatives: Literal["pool", "foils"] = "pool"
    """`pool`: hard negatives by ITC; `foils`: the records' own expressions that are true of nothing in the image."""


class GroundingConfig(PretrainConfig):
    """The same on images and expressions."""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "records"

    task: str = "grounding"
    losses: GroundingLossConfig = GroundingLossConfig()
