"""The views of image-text pairs that losses read, and the stages that compute them.

Legend: B batch, L text tokens, P patches, K masked positions, M masked words of the batch, D width, V vocabulary.

Student views:
    embedded          what `ImageTower.encode` takes
    clean_words       float [B, L, D], encoded captions
    masked_words      float [B, L, D], encoded masked captions
    short_words       float [B, L_short, D], encoded short captions
    clean_image       float [B, num_prefix_tokens + P, D], encoded whole images
    whole             clean images, embedded for fusion
    image_feature     float32 [B, D_itc], normalised
    text_feature      float32 [B, D_itc], normalised
    visible           images of which only the visible patches are encoded, embedded for fusion
    fused_patches     float [B, K, D], fused tokens at masked patches, by the masking plan
    fused_words       float [M, D], fused tokens at masked words (`mamo.losses.rows`), by the masking plan

Teacher views, of the clean pair:
    image_feature, text_feature
    patch_pixels      float [B, K, 3 * patch_h * patch_w], normalised pixels of masked patches
    patch_features    float [B, K, D_image], encoded masked patches
    patch_encoder     float [B, K, D_frozen], masked patches as the frozen encoder of MIM sees them
    fused_patches     float [B, K, D]
    fused_words       float [B, K, D], at masked words; rows with fewer end in fillings
    word_probs        float [B, K, V], word probabilities at masked words of the masked caption; 0 at fillings
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mamo.losses.mim import patchify
from mamo.losses.rows import has_fixed_rows, masked_rows
from mamo.models.frozen_encoder import FrozenEncoder
from mamo.models.fusion import gather_tokens
from mamo.models.vlm import Backbone, Mamo
from mamo.tasks.objective import Stage, Views
from mamo.tasks.pretrain.batch import PairBatch, ShortPairBatch
from mamo.teacher import Teacher


@dataclass(frozen=True, slots=True)
class FusedPass:
    """One masked pass through fusion.

    Attributes:
        image: `visible` encodes only the visible patches; `whole` the clean image.
        text: `clean` or `masked` caption, or the `short` one, whose words no loss reads.
        patches: name of the view of its fused tokens at masked patches; None reads none.
        words: name of the view of its fused tokens at masked words; None reads none.
    """

    image: Literal["visible", "whole"]
    text: Literal["clean", "masked", "short"]
    patches: str | None = None
    words: str | None = None


ALTERNATE = (
    FusedPass("visible", "clean", patches="fused_patches"),
    FusedPass("whole", "masked", words="fused_words"),
)
"""Mask one modality a pass (the paper's figure)."""
JOINT = (FusedPass("visible", "masked", patches="fused_patches", words="fused_words"),)
"""Mask both modalities in one pass."""
SHORT_TEXT = (
    FusedPass("visible", "short", patches="fused_patches"),
    FusedPass("whole", "masked", words="fused_words"),
)
"""As `ALTERNATE`, with a short caption for the masked picture (Fix-CLIP); the whole picture has the long one."""
PLANS = {"alternate": ALTERNATE, "joint": JOINT}
ENCODINGS = {"image": ("clean_image",), "text": ("clean_words", "masked_words")}
"""Views that teacher and student compute alike from one part, by the name of the part."""


# ---- the student ----------------------------------------------------------------------------------------------------


def encoding_stages() -> tuple[Stage, ...]:
    """Return the student's stages that precede the losses' own."""
    return (
        Stage(("embedded",), _embed),
        Stage(("clean_words", "masked_words"), lambda net, batch, _, wanted: encode_texts(net.backbone, batch, wanted)),
        Stage(("short_words",), _short_words),
        Stage(("clean_image",), _clean_image, needs=("embedded",)),
        Stage(("whole",), _whole, needs=("clean_image",)),
        Stage(("image_feature", "text_feature"), _features, needs=("clean_image", "clean_words")),
    )


def masked_stages(plan: tuple[FusedPass, ...]) -> tuple[Stage, ...]:
    """Return the student's stages of a masking plan."""
    passes = (
        Stage(
            tuple(name for name in (fused.patches, fused.words) if name is not None),
            functools.partial(_masked_pass, fused),
            needs=(fused.image, f"{fused.text}_words"),
        )
        for fused in plan
    )
    return (Stage(("visible",), _visible, needs=("embedded",)), *passes)


def encode_texts(backbone: Backbone, batch: PairBatch, wanted: frozenset[str]) -> Views:
    """Encode clean and masked captions, as wanted, in one call of the text encoder."""
    ids = {"clean_words": batch.input_ids, "masked_words": batch.masked_input_ids}
    names = [name for name in ids if name in wanted]
    encoded = backbone.text_encoder(torch.cat([ids[name] for name in names]), batch.is_valid.repeat(len(names), 1))
    return dict(zip(names, encoded.split(len(batch))))


def _embed(network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    return {"embedded": network.backbone.image_encoder.embed(batch.image)}


def _short_words(network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    assert isinstance(batch, ShortPairBatch)
    return {"short_words": network.backbone.text_encoder(batch.short_input_ids, batch.short_is_valid)}


def _clean_image(network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    return {"clean_image": network.backbone.image_encoder.encode(views["embedded"])}


def _whole(network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    return {"whole": network.backbone.fusion.embed_image(views["clean_image"])}


def _features(network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    backbone = network.backbone
    image_feature = backbone.image_feature(views["clean_image"])
    return {"image_feature": image_feature, "text_feature": backbone.text_feature(views["clean_words"])}


def _visible(network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    encoder, fusion = network.backbone.image_encoder, network.backbone.fusion
    encoded = encoder.encode(views["embedded"], batch.visible_patches)
    return {"visible": fusion.embed_image(encoded, batch.visible_patches)}


def _masked_pass(fused: FusedPass, network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    is_valid = batch.short_is_valid if isinstance(batch, ShortPairBatch) and fused.text == "short" else batch.is_valid
    text = views[f"{fused.text}_words"], is_valid
    found = _fuse(network.backbone, batch, views[fused.image], text, fused.patches, fused.words, wanted)
    if fused.words in found:
        found[fused.words] = masked_rows(found[fused.words], batch.text_slot_is_valid)  # [M, D]
    return found


def _fuse(
    backbone: Backbone,
    batch: PairBatch,
    image: Tensor,
    text: tuple[Tensor, Tensor],
    patches: str | None,
    words: str | None,
    wanted: frozenset[str],
) -> Views:
    """Fuse once and read at masked patches and masked words, as far as these views are wanted.

    `text` are encoded words float [B, L, D] and bool [B, L], False at padding.
    """
    fusion, positions = backbone.fusion, dict[str, Tensor]()
    if patches in wanted:
        positions[str(patches)] = fusion.patch_positions(batch.masked_patches)
    if words in wanted:
        positions[str(words)] = fusion.text_positions(batch.text_slots)
    fused = fusion(image, *text, output_positions=torch.cat(list(positions.values()), dim=1))
    return dict(zip(positions, fused.split([value.shape[1] for value in positions.values()], dim=1)))


# ---- the teacher ----------------------------------------------------------------------------------------------------


def teacher_stages(mim_encoder: FrozenEncoder | None = None) -> tuple[Stage, ...]:
    """Return the teacher's stages, and the one of the frozen encoder of `losses.mim_target: encoder`."""
    frozen = () if mim_encoder is None else (Stage(("patch_encoder",), functools.partial(_patch_encoder, mim_encoder)),)
    return (
        *frozen,
        Stage(("patch_pixels",), _patch_pixels),
        Stage(("clean_image",), lambda net, batch, _, __: {"clean_image": net.backbone.image_encoder(batch.image)}),
        Stage(("clean_words", "masked_words"), lambda net, batch, _, wanted: encode_texts(net.backbone, batch, wanted)),
        Stage(("patch_features",), _patch_features, needs=("clean_image",)),
        Stage(("image_feature", "text_feature"), _features, needs=("clean_image", "clean_words")),
        Stage(("whole",), _whole, needs=("clean_image",)),
        Stage(("word_probs",), _word_probs, needs=("whole", "masked_words")),
        Stage(("fused_patches", "fused_words"), _teacher_fused, needs=("whole", "clean_words")),
    )


def _patch_pixels(teacher: Teacher, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    encoder = teacher.backbone.image_encoder
    pixels = patchify(encoder.normalize(batch.image), encoder.patch_size_px)
    return {"patch_pixels": gather_tokens(pixels, batch.masked_patches)}


def _patch_encoder(
    frozen: FrozenEncoder, teacher: Teacher, batch: PairBatch, views: Views, wanted: frozenset[str]
) -> Views:
    return {"patch_encoder": gather_tokens(frozen(batch.image), batch.masked_patches)}


def _patch_features(teacher: Teacher, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    positions = batch.masked_patches + teacher.backbone.image_encoder.num_prefix_tokens
    return {"patch_features": gather_tokens(views["clean_image"], positions)}


def _word_probs(teacher: Teacher, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    fusion, is_valid = teacher.backbone.fusion, batch.text_slot_is_valid
    assert teacher.mlm is not None
    positions = fusion.text_positions(batch.text_slots)
    fused = fusion(views["whole"], views["masked_words"], batch.is_valid, output_positions=positions)
    probs = teacher.mlm(masked_rows(fused, is_valid)).float().softmax(dim=1)  # [M, V]
    if has_fixed_rows(probs.device):
        return {"word_probs": probs.unflatten(0, is_valid.shape) * is_valid[..., None]}
    padded = probs.new_zeros(*is_valid.shape, probs.shape[1])
    padded[is_valid] = probs
    return {"word_probs": padded}


def _teacher_fused(teacher: Teacher, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
    text = views["clean_words"], batch.is_valid
    return _fuse(teacher.backbone, batch, views["whole"], text, "fused_patches", "fused_words", wanted)
