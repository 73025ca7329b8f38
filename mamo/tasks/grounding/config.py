"""Config of weakly-supervised grounding."""

from typing import ClassVar, Literal

from mamo.tasks.pretrain.config import PretrainConfig


class GroundingConfig(PretrainConfig):
    """The same on images and expressions."""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "records"

    task: str = "grounding"
