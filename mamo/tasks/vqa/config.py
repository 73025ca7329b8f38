"""Config of visual question answering."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from mamo.config.schema import MamoConfig, Section
from mamo.config.section import Positive


class VqaSettings(Section):
    """Visual question answering."""

    head: Literal["decoder", "classifier"] = "decoder"
    """`decoder` writes answers word by word and is ranked over the answer list; `classifier` chooses from the list."""
    answer_min_count: Positive = 9
    """An answer is on the list if it is the commonest one to at least this many training questions."""
    shared_images: bool = False
    """Allow evaluation questions about training images (VQA-RAD, VQA-CP); their share is in the results."""


class VqaConfig(MamoConfig):
    """Answers to questions about images."""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "records"

    task: str = "vqa"
    vqa: VqaSettings = VqaSettings()

    def cross_fusion_problems(self) -> Iterator[str]:
        """Yield the decoder."""
        if self.vqa.head == "decoder":
            yield (
                "model.fusion_type: cross gives no fused image tokens, which task vqa reads; use concat or "
                "vqa.head: classifier"
            )
