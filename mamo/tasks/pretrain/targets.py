"""What one pre-training step learns from: the teacher's answers to its samples, and the global batch's counts.

Legend: B batch, L text tokens, K masked slots, D width of fusion, N ITC candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mamo.losses.mim import patchify
from mamo.models.cross_fusion import CrossFusion
from mamo.models.fusion import Fusion, gather_tokens
from mamo.models.vlm import Backbone
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.config import PretrainConfig


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher and the global batch give to one step; nothing here carries a gradient."""

    image_feature: Tensor | None
    """float32 [B, D_itc], the teacher's features of this process's samples."""
    text_feature: Tensor | None
    candidate_image: Tensor | None
    """float32 [N, D_itc], the global batch in rank order, then the queue."""
    candidate_text: Tensor | None
    candidate_image_id: Tensor
    """int64 [N]."""
    candidate_caption_id: Tensor
    candidate_is_filled: Tensor
    """bool [N], False at queue slots without a sample."""
    patches: Tensor | None
    """float [B, K_image, D_target], the MIM target at masked patches."""
    fused_image: Tensor | None
    """float [B, K_image, D], the MRM target at masked patches."""
    fused_text: Tensor | None
    """float [B, K_text, D], the MRM target at masked words."""
    masked_words: Tensor | None
    """float [B, K_text, D], the teacher's fused tokens at masked words of the *masked* caption: its word guesses."""
    first: int
    """Index of this process's first sample among the candidates."""
    itc_alpha: float
    """Share of the teacher's opinion in the ITC target at this step."""
    mlm_alpha: float
    """Share of the teacher's opinion in the MLM target at this step."""
    n_samples: int
    """Samples of the global batch."""
    n_masked_words: Tensor
    n_itm: Tensor


def linear_ramp(alpha: float, ramp_steps: int, step: int) -> float:
    """The share of soft targets at optimizer step `step` (0-based): from 0 to `alpha` linearly over `ramp_steps`."""
    return alpha * (min(1.0, step / ramp_steps) if ramp_steps else 1.0)


def feature_std(features: Tensor) -> Tensor:
    """Mean standard deviation per dimension of unit vectors [N, D], times sqrt(D): 1 = spread evenly, 0 = collapsed."""
    mean: Tensor = features.std(dim=0, correction=0).mean()
    return mean * math.sqrt(features.shape[1])


def encode_texts(
    backbone: Backbone, batch: PairBatch, clean: bool, masked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Clean and masked captions, each float [B, L, D] where wanted, in one call of the text encoder."""
    wanted = [ids for ids, is_wanted in ((batch.input_ids, clean), (batch.masked_input_ids, masked)) if is_wanted]
    if not wanted:
        return None, None
    encoded = list(backbone.text_encoder(torch.cat(wanted), batch.is_valid.repeat(len(wanted), 1)).split(len(batch)))
    return encoded.pop(0) if clean else None, encoded.pop() if masked else None


def fuse_and_split(
    fusion: Fusion | CrossFusion, image: Tensor, text: Tensor, is_valid: Tensor, wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One fusion, of arguments as its `forward` takes them, read at several sets of positions int64 [B, R], by name."""
    fused = fusion(image, text, is_valid, read=torch.cat(list(wanted.values()), dim=1))
    return dict(zip(wanted, fused.split([positions.shape[1] for positions in wanted.values()], dim=1)))


def teacher_pass(config: PretrainConfig, teacher: Backbone, batch: PairBatch, image: Tensor) -> dict[str, Tensor]:
    """The teacher's answers to the clean pair and, for distilled MLM, to the clean image with the masked caption.

    Args:
        image: float [B, 3, H, W], normalised.

    Returns:
        By their names in `Targets`, only what a switched-on loss reads.
    """
    losses, given = config.losses, {}
    weights = losses.weights
    contrasts = weights.itc > 0 and losses.itc_candidates == "teacher"
    distils = losses.mlm_soft_target_alpha > 0
    fuses = weights.mrm_image > 0 or weights.mrm_text > 0
    reads_features = weights.mim > 0 and losses.mim_target == "features"
    if weights.mim > 0 and losses.mim_target == "pixels":
        given["patches"] = gather_tokens(patchify(image, teacher.image_encoder.patch_size_px), batch.masked_patches)
    if not (contrasts or distils or fuses or reads_features):
        return given or {"nothing": torch.empty(len(batch), 0)}
    image_tokens = teacher.image_encoder(image)
    if reads_features:
        given["patches"] = gather_tokens(image_tokens, batch.masked_patches + teacher.image_encoder.num_prefix_tokens)
    clean_text, masked_text = encode_texts(teacher, batch, contrasts or fuses, distils)
    if contrasts:
        assert clean_text is not None
        given["image_feature"] = teacher.image_feature(image_tokens)
        given["text_feature"] = teacher.text_feature(clean_text)
    if not (fuses or distils):
        return given
    fusion = teacher.fusion
    embedded = fusion.embed_image(image_tokens)
    slots = fusion.text_positions(batch.text_slots)
    if masked_text is not None:
        given["masked_words"] = fusion(embedded, masked_text, batch.is_valid, read=slots)
    if fuses and clean_text is not None:
        wanted = {}
        if weights.mrm_image > 0:
            assert isinstance(fusion, Fusion)  # the config refuses the other
            wanted["fused_image"] = fusion.patch_positions(batch.masked_patches)
        if weights.mrm_text > 0:
            wanted["fused_text"] = slots
        given |= fuse_and_split(fusion, embedded, clean_text, batch.is_valid, wanted)
    return given
