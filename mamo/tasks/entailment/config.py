"""Config of visual entailment."""

from typing import ClassVar, Literal

from mamo.config.schema import MamoConfig, Section


class EntailmentSettings(Section):
    """Visual entailment (SNLI-VE)."""

    text_only: bool = False
    """Train and evaluate on pictures of the mean colour: the control that sees the sentence and no picture."""


class EntailmentConfig(MamoConfig):
    """Does a picture entail a sentence, contradict it, or neither?"""

    file_source: ClassVar[Literal["pairs", "records"] | None] = "records"

    task: str = "entailment"
    entailment: EntailmentSettings = EntailmentSettings()
