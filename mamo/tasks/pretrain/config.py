"""Config of MAMO's pre-training."""

from collections.abc import Iterator
from typing import ClassVar

from mamo.config.objective import LossConfig, MaskingConfig, TeacherConfig
from mamo.config.schema import MamoConfig

READ_MASKED_WORDS = ("mlm", "mrm_text")
"""Losses at masked words, which need a tokenizer with [MASK]."""


class PretrainConfig(MamoConfig):
    """The losses of `losses` on image-text pairs, which fine-tune retrieval too."""

    scores_items: ClassVar[bool] = True
    task: str = "pretrain"
    masking: MaskingConfig = MaskingConfig()
    losses: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()

    @property
    def pass_unit(self) -> int:
        """Return the size of ITM's pools, which lie within a forward pass."""
        return self.losses.itm_pool_size if self.losses.weights.itm else 1

    @property
    def masks_words(self) -> bool:
        """See `RunConfig.masks_words`; losses from outside may read masked words."""
        return bool(self.losses.extra) or any(getattr(self.losses.weights, name) for name in READ_MASKED_WORDS)

    def problems(self) -> Iterator[str]:
        """Yield also contradictions between losses and micro-batches."""
        yield from super().problems()
        training = self.training
        if self.losses.itc_candidates == "batch" and training.micro_batch != training.batch_size_global:
            yield "losses.itc_candidates: batch contrasts within a forward pass; use teacher with micro-batches"
        if self.masking.text_for_masked_image == "short" and self.losses.itm_negatives != "pool":
            yield "masking.text_for_masked_image: short contradicts losses.itm_negatives: foils; use same or pool"

    def cross_fusion_problems(self) -> Iterator[str]:
        """Yield the losses at fused image tokens."""
        names = [name for name in ("mim", "mrm_image") if getattr(self.losses.weights, name)]
        if names:
            yield (
                f"model.fusion_type: cross gives no fused image tokens, from which {' and '.join(names)} would learn; "
                f"set {' and '.join(f'losses.weights.{name}' for name in names)} to 0 or use concat"
            )
