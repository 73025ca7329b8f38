"""Config of weakly-supervised grounding."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from mamo.tasks.pretrain.config import PretrainConfig


class GroundingConfig(PretrainConfig):
    """The same on images and expressions."""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "records"

    task: str = "grounding"

    def problems(self) -> Iterator[str]:
        """Yield also what expressions do not have."""
        yield from super().problems()
        if self.masking.text_for_masked_image == "short":
            yield "masking.text_for_masked_image: expressions have no short captions; use same"
