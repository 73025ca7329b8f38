"""Config of reasoning about images."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from mamo.config.schema import MamoConfig, Section
from mamo.config.section import Positive


class ReasoningSettings(Section):
    """Sentences about one image or a pair (NLVR, NLVR2)."""

    cross_layers: Positive = 1
    """Transformer layers across the fused tokens of the images; the last one computes only their [CLS]."""


class ReasoningConfig(MamoConfig):
    """Is a sentence true of images?"""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "records"

    task: str = "reasoning"
    reasoning: ReasoningSettings = ReasoningSettings()

    def cross_fusion_problems(self) -> Iterator[str]:
        """Yield the head, which reads fused image tokens."""
        yield "model.fusion_type: cross gives no fused image tokens, which task reasoning reads; use concat"
