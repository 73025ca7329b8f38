"""Configs of MLIM: its pre-training, and matching of listings."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mamo.config.objective import BaseMaskingConfig
from mamo.config.schema import ModelConfig, RunConfig, Section
from mamo.config.section import Fraction, Ratio, Weight


class MlimModelConfig(ModelConfig):
    """The network of MLIM: convolutions and one transformer."""

    embedder_layers: Annotated[int, Field(ge=1, le=10)] = 3
    """MLIM's convolutions, each of which halves the image: a patch has 2 to this power pixels a side (paper: 7)."""


class MlimMaskingConfig(BaseMaskingConfig):
    """Masked view of MLIM."""

    mode: Literal["modality_aware"] = "modality_aware"
    """`modality_aware`: one pass; of each third of the samples the image, the text, or both are masked, the last by
    `light_ratio`."""
    light_ratio: Ratio = 0.15
    """Share of both where both are masked. MLIM does not state it; 15 % is BERT's."""


class MlimLossWeights(Section):
    """Weight of each loss of MLIM in the sum; 0 switches a loss and its head off."""

    unused: ClassVar[float | None] = 0.0

    itm: Weight = 1.0
    """Image-text matching by the transformer, true pairs against others of the batch."""
    mlm: Weight = 1.0
    """Masked words."""
    recon: Weight = 0.0
    """MLIM's image loss, squared error of pixels."""


class MlimLossConfig(Section):
    """The losses of MLIM."""

    weights: MlimLossWeights = MlimLossWeights()
    itm_pool_size: Annotated[int, Field(ge=2)] = 32
    """Negatives come from fixed pools of this many consecutive samples."""
    recon_area: Literal["masked", "image"] = "masked"
    """Pixels that `recon` counts: of masked patches, or all. Sources on MLIM differ."""

    def problems(self) -> Iterator[str]:
        """Yield whether nothing is left to learn."""
        if all(weight == 0 for _, weight in self.weights):
            yield "weights: every loss of MLIM is switched off"


class MlimConfig(RunConfig):
    """Pre-training of MLIM on image-text pairs."""

    task: str = "mlim"
    model: MlimModelConfig = MlimModelConfig()
    masking: MlimMaskingConfig = MlimMaskingConfig()
    losses: MlimLossConfig = MlimLossConfig()

    @property
    def masks_words(self) -> bool:
        """See `RunConfig.masks_words`."""
        return True

    @property
    def pass_unit(self) -> int:
        """Return the size of ITM's pools, which lie within a forward pass."""
        return self.losses.itm_pool_size if self.losses.weights.itm else 1

    def problems(self) -> Iterator[str]:
        """Yield also an evaluation that there is not."""
        yield from super().problems()
        if self.data.source == "pairs" and self.evaluation.enabled:
            yield "evaluation.enabled: MLIM's pre-training is evaluated only on scenes; use false with pairs"


class MatchingSettings(Section):
    """Are two listings of a catalogue of the same item?"""

    modality_dropout: Fraction = 0.6667
    """How often one modality of a training pair is dropped, image or text alike. MLIM does not state it; the default
    gives both, only the image and only the text a third each; 0 never drops."""


class MatchingConfig(RunConfig):
    """Fine-tuning of MLIM on pairs of a catalogue's items."""

    file_source: ClassVar[Literal["pairs", "records"] | None] = None

    task: str = "matching"
    model: MlimModelConfig = MlimModelConfig()
    matching: MatchingSettings = MatchingSettings()
