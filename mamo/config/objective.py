"""Sections of the objective of MAMO: masks, losses, momentum teacher."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from mamo.config.section import Fraction, NonNegative, Positive, Ratio, Section, Settings, Weight
from mamo.config.values import expand_path


class BaseMaskingConfig(Section):
    """Share of patches and words that is masked, whichever passes read it."""

    image_ratio: Ratio = 0.75
    """Share of the patches that are masked, at least one."""
    image_style: Literal["random", "block"] = "random"
    """`random` patches, or rectangular blocks of them (BEiT)."""
    text_ratio: Ratio = 0.25
    """Share of the tokens, special ones apart, that are masked, at least one."""
    text_unit: Literal["token", "word"] = "token"
    """`word` masks all pieces of a chosen word."""


class MaskingConfig(BaseMaskingConfig):
    """Masked views of MAMO; ratios as in the paper's section 4 (75 % and 25 %)."""

    mode: Literal["alternate", "joint"] = "alternate"
    """`alternate`: one modality is masked a pass; `joint`: one pass with both masked."""
    plan: str | None = None
    """Masked passes by a class from outside, `module:Class`; null: those of `mode`."""
    text_for_masked_image: Literal["same", "short"] = "same"
    """Text of the pass with the masked picture: the `same` caption, or a `short` one (Fix-CLIP), which is the shortest
    of the record, or the first sentence of its only one; of scenes the caption of two objects or of a number."""
    text_replacement: Literal["mask", "bert"] = "mask"
    """`mask`: a chosen token becomes [MASK]; `bert`: 80 % do, 10 % become a random token, 10 % stay."""

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the passes and their texts."""
        if self.text_for_masked_image == "short" and self.mode != "alternate":
            yield f"text_for_masked_image: short contradicts masking.mode: {self.mode}; use alternate"
        elif self.text_for_masked_image == "short" and self.plan is not None:
            yield "text_for_masked_image: contradicts masking.plan, whose passes name their texts; use same"


class LossWeights(Section):
    """Weight of each loss in the sum (the paper's Eq. 6: all 1); 0 switches a loss and its head off."""

    unused: ClassVar[float | None] = 0.0

    itc: Weight = 1.0
    """Image-text contrast of the two encoders."""
    itm: Weight = 1.0
    """Image-text matching by fusion, true pairs against hard negatives."""
    mlm: Weight = 1.0
    """Masked words."""
    mim: Weight = 1.0
    """Masked patches: `mim_target`."""
    mrm_image: Weight = 1.0
    """At masked patches, the teacher's fused tokens of the whole pair."""
    mrm_text: Weight = 1.0
    """At masked words, the teacher's fused tokens of the whole pair."""


class MimEncoderConfig(Section):
    """The frozen image encoder of `mim_target: encoder`."""

    name: str | None = None
    """Its name, as in `model.image`; null where `checkpoint` names a run."""
    patch_size_px: Positive | None = None
    """Side of its patches. Pictures are resized for it to as many of them as the network's encoder has."""
    width: Positive | None = None
    """Features of a token, as in `model.image`."""
    depth: Positive | None = None
    """Blocks, as in `model.image`."""
    heads: Positive | None = None
    """Attention heads, as in `model.image`."""
    weights: str = "timm"
    """`timm`, or a file or folder, as in `model.image`."""
    checkpoint: str | None = None
    """Run or step folder whose image encoder it is, in place of a published one."""

    @field_validator("weights", "checkpoint")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return None if value is None else expand_path(value)


class LossConfig(Section):
    """The losses and what they contrast with."""

    weights: LossWeights = LossWeights()
    extra: list[str | Settings] = []
    """Losses from outside, each a class `module:Class`, or a section with its settings."""
    itc_candidates: Literal["teacher", "batch"] = "teacher"
    """`teacher`: the teacher's features of the global batch and of the queue; `batch`: plainly in batch."""
    itc_contrast: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over the candidates of a sample, or a `sigmoid` for each pair with a learned bias from -10 (SigLIP,
    which sets `temperature: 0.1`)."""
    queue_size: NonNegative = 0
    """Teacher features of past samples kept as further ITC candidates."""
    itc_soft_target_alpha: Fraction = 0.0
    """Share of the teacher's similarities in the ITC target (ALBEF: 0.4)."""
    itc_soft_target_ramp_steps: NonNegative = 0
    """Steps over which that share grows from 0."""
    mlm_soft_target_alpha: Fraction = 0.0
    """Share of the teacher's word probabilities in the MLM target: momentum distillation (ALBEF: 0.4)."""
    mlm_soft_target_ramp_steps: NonNegative = 0
    """Steps over which that share grows from 0."""
    temperature: Annotated[float, Field(ge=0.001, le=0.5)] = 0.07
    """First value of the learnable ITC temperature."""
    itm_pool_size: Annotated[int, Field(ge=2)] = 32
    """Hard negatives come from fixed pools of this many consecutive samples."""
    itm_uniform_steps: NonNegative = 0
    """First steps, in which negatives are drawn from the pool at random: with hard ones alone ITM learns later."""
    itm_negatives: Literal["pool", "foils", "both"] = "pool"
    """`pool`: hard negatives by ITC; `foils`: texts that are false of the image, those of the data (`foils` of pairs,
    `foil` of expressions) or, of scenes, the caption with one word changed; `both`: pool and foils."""
    duplicates: Literal["excluded", "negatives"] = "excluded"
    """Other samples of the same image or caption: never negatives, or `negatives` as all others (ALBEF)."""
    queue_start: Literal["empty", "random"] = "empty"
    """The queue before the first step: no candidates, or `random` unit vectors, which are negatives (ALBEF)."""
    mim_target: Literal["features", "pixels", "encoder"] = "features"
    """The teacher's image-encoder features, normalised pixels (Table 9), or those of the frozen `mim_encoder` (EVA)."""
    mim_encoder: MimEncoderConfig = MimEncoderConfig()

    def problems(self) -> Iterator[str]:
        """Yield contradictions between the losses."""
        if not self.extra and all(weight == 0 for _, weight in self.weights):
            yield "weights: every loss is switched off"
        if self.itc_candidates == "batch" and self.queue_size:
            yield "queue_size: contradicts losses.itc_candidates: batch; use 0"
        if self.itc_contrast == "sigmoid" and not self.weights.itc:
            yield "itc_contrast: sigmoid contradicts losses.weights.itc: 0; remove it"
        if self.itc_contrast == "sigmoid" and self.itc_soft_target_alpha:
            yield "itc_soft_target_alpha: contradicts losses.itc_contrast: sigmoid, whose targets are hard; use 0"
        if self.queue_start == "random" and not self.queue_size:
            yield "queue_start: random contradicts losses.queue_size: 0; use empty"
        if self.itc_candidates == "batch" and self.itc_soft_target_alpha:
            yield "itc_soft_target_alpha: contradicts losses.itc_candidates: batch; use 0"
        for key, name in (("mlm_soft_target_alpha", "mlm"), ("itc_soft_target_alpha", "itc")):
            if getattr(self, key) and not getattr(self.weights, name):
                yield f"{key}: contradicts losses.weights.{name}: 0; use 0"
        yield from self._itm_problems()
        yield from self._mim_problems()

    def _itm_problems(self) -> Iterator[str]:
        if self.itm_uniform_steps and not self.weights.itm:
            yield "itm_uniform_steps: contradicts losses.weights.itm: 0; use 0"
        if self.itm_uniform_steps and self.itm_negatives == "foils":
            yield "itm_uniform_steps: contradicts losses.itm_negatives: foils, which draws none from the pool; use 0"

    def _mim_problems(self) -> Iterator[str]:
        if self.mim_target != "features" and not self.weights.mim:
            yield f"mim_target: {self.mim_target} contradicts losses.weights.mim: 0; remove it"
        sources = [self.mim_encoder.name, self.mim_encoder.checkpoint]
        if self.mim_target == "encoder" and sources.count(None) != 1:
            yield "mim_encoder: mim_target: encoder needs either its name or a checkpoint"
        if self.mim_target != "encoder" and sources.count(None) != 2:
            yield f"mim_encoder: contradicts losses.mim_target: {self.mim_target}; use encoder, or remove it"


class TeacherConfig(Section):
    """The momentum teacher: teacher = m * teacher + (1 - m) * student, once an optimizer step."""

    momentum: Fraction = 0.995
    """m; 1 never moves the teacher."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` moves the momentum from `momentum` to 1 over the run."""
    dropout: bool = False
    """Whether the teacher drops out as the student does, by `model.dropout` (ALBEF)."""
