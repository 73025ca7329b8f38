"""One MAMO pre-training step: L = ITC + ITM + MLM + MIM + MRM (the paper's Eq. 6).

Legend: B batch, L text tokens, P patches, K masked slots, D width of fusion, N ITC candidates, S ITM pool size.

Passes (`masking.mode: alternate`, the paper's figure):
    target        teacher, clean pair                      -> ITC candidates, MIM features, MRM tokens
    masked image  online, visible patches + clean caption  -> MIM, MRM at masked patches
    masked text   online, clean image + masked caption     -> MLM, MRM at masked words
    matching      online, clean pairs + hard negatives     -> ITC (unimodal), ITM (fused)
`joint` replaces the two masked passes by one with both masked. Clean image and clean caption are encoded once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mamo.config import LOSS_NAMES, Config
from mamo.data.collate import PairBatch
from mamo.losses.itc import itc_loss, itc_targets, positives
from mamo.losses.itm import draw_negatives, itm_loss
from mamo.losses.mim import mim_loss, patchify
from mamo.losses.mlm import mlm_loss
from mamo.losses.mrm import mrm_loss
from mamo.models.fusion import take_tokens
from mamo.models.vlm import Backbone, Mamo
from mamo.queue import FeatureQueue
from mamo.tasks.parts import PixelNorm
from mamo.teacher import Teacher, momentum_at
from mamo.training.distributed import gather, rank, total, world_size


def spread(features: Tensor) -> Tensor:
    """Mean standard deviation per dimension of unit vectors [N, D], times sqrt(D): 1 = spread evenly, 0 = collapsed."""
    mean: Tensor = features.std(dim=0, correction=0).mean()
    return mean * math.sqrt(features.shape[1])


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
    first: int
    """Index of this process's first sample among the candidates."""
    alpha: float
    """Share of the teacher's opinion in the ITC target at this step."""
    n_samples: int
    """Samples of the global batch."""
    n_masked_words: Tensor
    n_itm: Tensor


class PretrainTask:
    """MAMO pre-training: `prepare` (teacher, no gradient), `losses` (each micro-batch), `after_step` (state moves)."""

    def __init__(self, config: Config, network: Mamo, normalise: PixelNorm) -> None:
        self.config = config
        self.network = network
        self.normalise = normalise
        self.weights = {name: w for name, w in dict(config.losses.weights).items() if w > 0}
        self.teacher = Teacher(network.backbone)
        self.queue = FeatureQueue(config.losses.queue_size, config.model.itc_width)
        assert set(self.weights) <= set(LOSS_NAMES)
        if config.losses.itc_candidates == "batch" and world_size() > 1:
            raise ValueError(
                "losses.itc_candidates: batch contrasts within one process, and this run has "
                f"{world_size()}; use teacher"
            )

    def modules(self) -> dict[str, torch.nn.Module]:
        """Everything that a checkpoint must hold, by name."""
        return {"student": self.network, "teacher": self.teacher, "queue": self.queue}

    def needs(self, *names: str) -> bool:
        """Whether any of these losses is switched on."""
        return any(name in self.weights for name in names)

    # ---- the target pass --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, batch: PairBatch, micro_batch_size: int, step: int) -> tuple[Targets, dict[str, Tensor]]:
        """Teacher targets of this process's samples, and the candidates and counts of the global batch.

        Returns:
            The targets and the collapse metrics: the spread of the teacher's features over the global batch, per
            dimension, relative to features that fill the sphere (1 = spread evenly, 0 = collapsed).
        """
        parts = [
            self._teacher_pass(batch.part(i, i + micro_batch_size)) for i in range(0, len(batch), micro_batch_size)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        image_id, caption_id = gather(batch.image_id), gather(batch.caption_id)
        is_filled = torch.ones_like(image_id, dtype=torch.bool)
        candidate_image = candidate_text = None
        metrics = {}
        if "image_feature" in joined:
            candidate_image, candidate_text = gather(joined["image_feature"]), gather(joined["text_feature"])
            metrics["teacher_spread/image"] = spread(candidate_image)
            metrics["teacher_spread/text"] = spread(candidate_text)
            candidate_image = torch.cat([candidate_image, self.queue.image_feature])
            candidate_text = torch.cat([candidate_text, self.queue.text_feature])
            image_id = torch.cat([image_id, self.queue.image_id])
            caption_id = torch.cat([caption_id, self.queue.caption_id])
            is_filled = torch.cat([is_filled, self.queue.is_filled()])
        if "fused_text" in joined:
            fused = gather(functional.normalize(joined["fused_text"][:, 0].float(), dim=-1))
            metrics["teacher_spread/fused_text"] = spread(fused)
        if "fused_image" in joined:
            fused = gather(functional.normalize(joined["fused_image"][:, 0].float(), dim=-1))
            metrics["teacher_spread/fused_image"] = spread(fused)
        has_negative = ~self._pool_positives(batch).all(dim=2)
        targets = Targets(
            image_feature=joined.get("image_feature"),
            text_feature=joined.get("text_feature"),
            candidate_image=candidate_image,
            candidate_text=candidate_text,
            candidate_image_id=image_id,
            candidate_caption_id=caption_id,
            candidate_is_filled=is_filled,
            patches=joined.get("patches"),
            fused_image=joined.get("fused_image"),
            fused_text=joined.get("fused_text"),
            first=rank() * len(batch),
            alpha=self._alpha_at(step),
            n_samples=self.config.training.batch_size_global,
            n_masked_words=total(batch.text_slot_is_valid.sum()).clamp(min=1),
            n_itm=total(len(batch) + 2 * has_negative.sum()),
        )
        return targets, metrics

    def _teacher_pass(self, batch: PairBatch) -> dict[str, Tensor]:
        """The clean pair through the teacher; only what a switched-on loss reads."""
        teacher = self.teacher.module
        assert isinstance(teacher, Backbone)
        image = self.normalise(batch.image)
        given = {}
        is_feature_target = self.config.losses.mim_target == "features"
        if self.needs("mim") and not is_feature_target:
            given["patches"] = take_tokens(patchify(image, teacher.image_encoder.patch_size_px), batch.masked_patches)
        contrasts = self.needs("itc") and self.config.losses.itc_candidates == "teacher"
        if not (contrasts or self.needs("mrm_image", "mrm_text") or (self.needs("mim") and is_feature_target)):
            return given or {"nothing": torch.empty(len(batch), 0)}
        image_tokens = teacher.image_encoder(image)
        n_prefix = teacher.image_encoder.n_prefix
        if self.needs("mim") and is_feature_target:
            given["patches"] = take_tokens(image_tokens, batch.masked_patches + n_prefix)
        if not (contrasts or self.needs("mrm_image", "mrm_text")):
            return given
        text_tokens = teacher.text_encoder(batch.input_ids, batch.is_valid)
        if contrasts:
            given["image_feature"] = teacher.image_feature(image_tokens)
            given["text_feature"] = teacher.text_feature(text_tokens)
        if self.needs("mrm_image", "mrm_text"):
            embedded = teacher.fusion.embed_image(image_tokens)
            n_image = batch.masked_patches.shape[1] if self.needs("mrm_image") else 0
            read = torch.cat(
                [
                    *([batch.masked_patches + n_prefix] if self.needs("mrm_image") else []),
                    *([batch.text_slots + teacher.fusion.n_image_slots] if self.needs("mrm_text") else []),
                ],
                dim=1,
            )
            fused = teacher.fusion(embedded, text_tokens, batch.is_valid, read=read)
            if self.needs("mrm_image"):
                given["fused_image"] = fused[:, :n_image]
            if self.needs("mrm_text"):
                given["fused_text"] = fused[:, n_image:]
        return given

    # ---- the online passes ------------------------------------------------------------------------------------------

    def losses(self, batch: PairBatch, targets: Targets, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted losses and metrics of one micro-batch, both as shares of the global batch: they add up.

        Args:
            batch: samples `start` to `start + len(batch)` of the process's batch that `targets` was prepared from.
        """
        backbone, fusion = self.network.backbone, self.network.backbone.fusion
        part = slice(start, start + len(batch))
        masks_image, masks_text = self.needs("mim", "mrm_image"), self.needs("mlm", "mrm_text")
        is_joint = self.config.masking.mode == "joint"
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        patches = backbone.image_encoder.embed(self.normalise(batch.image))
        clean_text, masked_text = self._encode_text(batch, masks_text)

        clean_image = clean_slots = None
        if self.needs("itc", "itm") or (masks_text and not is_joint):
            clean_image = backbone.image_encoder.encode(patches)
            clean_slots = fusion.embed_image(clean_image) if self.needs("itm") or not is_joint else None
        if clean_image is not None and self.needs("itc", "itm"):
            features = backbone.image_feature(clean_image), backbone.text_feature(clean_text)
            if self.needs("itc"):
                losses["itc"], metrics["itc_accuracy"] = self._itc(*features, batch, targets, start)
            if clean_slots is not None and self.needs("itm"):
                losses["itm"], metrics["itm_accuracy"] = self.itm(*features, clean_slots, clean_text, batch, targets)

        slots_image, slots_text = fusion.image_slots(batch.masked_patches), fusion.text_position(batch.text_slots)
        masked_slots = None
        if masks_image or (masks_text and is_joint):
            visible = backbone.image_encoder.encode(patches, batch.visible_patches)
            masked_slots = fusion.embed_image(visible, batch.visible_patches)
        fused_image = fused_text = None
        if is_joint and masked_slots is not None:
            both = fusion(masked_slots, masked_text, batch.is_valid, read=torch.cat([slots_image, slots_text], dim=1))
            fused_image, fused_text = both.split([slots_image.shape[1], slots_text.shape[1]], dim=1)
        elif masked_slots is not None:
            fused_image = fusion(masked_slots, clean_text, batch.is_valid, read=slots_image)
        if masks_text and clean_slots is not None and not is_joint:
            fused_text = fusion(clean_slots, masked_text, batch.is_valid, read=slots_text)
        if masks_image and fused_image is not None:
            losses |= self._image_losses(fused_image, targets, part)
        if masks_text and fused_text is not None:
            text_losses, text_metrics = self._text_losses(fused_text, batch, targets, part)
            losses |= text_losses
            metrics |= text_metrics
        return losses, metrics

    def _encode_text(self, batch: PairBatch, masks_text: bool) -> tuple[Tensor, Tensor]:
        """Clean and masked captions in one call of the text encoder."""
        encoder = self.network.backbone.text_encoder
        if not masks_text:
            clean = encoder(batch.input_ids, batch.is_valid)
            return clean, clean
        ids = torch.cat([batch.input_ids, batch.masked_input_ids])
        both = encoder(ids, torch.cat([batch.is_valid, batch.is_valid]))
        return both[: len(batch)], both[len(batch) :]

    def _itc(
        self, image_feature: Tensor, text_feature: Tensor, batch: PairBatch, targets: Targets, start: int
    ) -> tuple[Tensor, Tensor]:
        temperature = self._temperature()
        if targets.candidate_image is None:  # plainly in batch
            candidate_image, candidate_text = image_feature, text_feature
        else:
            assert targets.candidate_text is not None
            candidate_image, candidate_text = targets.candidate_image, targets.candidate_text
        own = torch.arange(len(batch), device=image_feature.device) + targets.first + start
        is_excluded = positives(
            batch.image_id, batch.caption_id, targets.candidate_image_id, targets.candidate_caption_id
        )
        is_excluded = is_excluded | ~targets.candidate_is_filled
        is_excluded = is_excluded.scatter(1, own[:, None], False)
        logits = [image_feature @ candidate_text.t() / temperature, text_feature @ candidate_image.t() / temperature]
        opinions = logits  # not read at alpha 0
        if targets.alpha > 0 and targets.image_feature is not None and targets.text_feature is not None:
            rows = slice(start, start + len(batch))
            opinions = [
                targets.image_feature[rows] @ candidate_text.t() / temperature.detach(),
                targets.text_feature[rows] @ candidate_image.t() / temperature.detach(),
            ]
        image_loss, text_loss = (
            itc_loss(
                logit, itc_targets(opinion.detach(), own, is_excluded, targets.alpha), is_excluded, targets.n_samples
            )
            for logit, opinion in zip(logits, opinions)
        )
        hits = logits[0].detach().masked_fill(is_excluded, -torch.inf).argmax(dim=1) == own
        return (image_loss + text_loss) / 2, hits.sum() / targets.n_samples

    def _pool_positives(self, batch: PairBatch) -> Tensor:
        """bool [pools, S, S], True where two samples of a pool match each other."""
        size = self.config.losses.itm_pool_size
        if not self.needs("itm"):
            size = len(batch)
        image_id, caption_id = batch.image_id.view(-1, size), batch.caption_id.view(-1, size)
        same_image = image_id[:, :, None] == image_id[:, None, :]
        return same_image | (caption_id[:, :, None] == caption_id[:, None, :])

    def itm(
        self,
        image_feature: Tensor,
        text_feature: Tensor,
        embedded: Tensor,
        text: Tensor,
        batch: PairBatch,
        targets: Targets,
    ) -> tuple[Tensor, Tensor]:
        """Each pair, each image with a hard negative text, each text with a hard negative image: 3 B fusions."""
        n, size = len(batch), self.config.losses.itm_pool_size
        is_positive = self._pool_positives(batch)
        with torch.no_grad():
            images, texts = (feature.view(n // size, size, -1) for feature in (image_feature, text_feature))
            similarity = images @ texts.transpose(1, 2) / self._temperature()  # [pools, S, S]
            noise = batch.itm_noise.view(-1, size, 2, size)
            text_negative, has_text = draw_negatives(similarity, is_positive, noise[:, :, 0])
            image_negative, has_image = draw_negatives(similarity.transpose(1, 2), is_positive, noise[:, :, 1])
        first = torch.arange(0, n, size, device=embedded.device)[:, None]
        text_rows, image_rows = (text_negative + first).flatten(), (image_negative + first).flatten()
        own = torch.arange(n, device=embedded.device)
        text_choice, image_choice = torch.cat([own, text_rows, own]), torch.cat([own, own, image_rows])
        read = torch.full((3 * n, 1), self.network.backbone.fusion.n_image_slots, device=embedded.device)  # [CLS]
        fused = self.network.backbone.fusion(
            embedded[image_choice], text[text_choice], batch.is_valid[text_choice], read=read
        )
        assert self.network.itm is not None
        logits = self.network.itm(fused[:, 0])
        is_match = torch.arange(3 * n, device=embedded.device) < n
        is_valid = torch.cat([torch.ones_like(own, dtype=torch.bool), has_text.flatten(), has_image.flatten()])
        hits = ((logits.argmax(dim=1) == is_match.long()) & is_valid).sum() / targets.n_itm
        return itm_loss(logits, is_match, is_valid, targets.n_itm), hits

    def _image_losses(self, fused: Tensor, targets: Targets, part: slice) -> dict[str, Tensor]:
        losses = {}
        n_global = targets.n_samples * fused.shape[1]
        if self.network.mim is not None:
            assert targets.patches is not None
            losses["mim"] = mim_loss(self.network.mim(fused), targets.patches[part], n_global)
        if self.network.mrm_image is not None:
            assert targets.fused_image is not None
            losses["mrm_image"] = mrm_loss(self.network.mrm_image(fused), targets.fused_image[part], n_global)
        return losses

    def _text_losses(
        self, fused: Tensor, batch: PairBatch, targets: Targets, part: slice
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, metrics = {}, {}
        is_valid = batch.text_slot_is_valid
        words = fused[is_valid]  # [M, D]
        if self.network.mlm is not None:
            labels = batch.input_ids.gather(1, batch.text_slots)[is_valid]
            logits = self.network.mlm(words)
            losses["mlm"] = mlm_loss(logits, labels, targets.n_masked_words)
            metrics["mlm_accuracy"] = (logits.argmax(dim=1) == labels).sum() / targets.n_masked_words
        if self.network.mrm_text is not None:
            assert targets.fused_text is not None
            target = targets.fused_text[part][is_valid]
            losses["mrm_text"] = mrm_loss(self.network.mrm_text(words), target, targets.n_masked_words)
        return losses, metrics

    def _temperature(self) -> Tensor:
        """The learned temperature; without ITC, which learns it, its configured value."""
        if self.network.temperature is None:
            return torch.tensor(self.config.losses.temperature)
        return self.network.temperature

    def _alpha_at(self, step: int) -> float:
        """ITC's soft-target share, ramped linearly from 0 over `itc_soft_target_ramp_steps`."""
        ramp = self.config.losses.itc_soft_target_ramp_steps
        return self.config.losses.itc_soft_target_alpha * (min(1.0, step / ramp) if ramp else 1.0)

    # ---- state ------------------------------------------------------------------------------------------------------

    def after_step(self, batch: PairBatch, targets: Targets, step: int) -> None:
        """Teacher, queue and temperature move here and nowhere else, once per optimizer step."""
        self.teacher.update(
            self.network.backbone, momentum_at(self.config.teacher, step, self.config.training.total_steps)
        )
        if targets.candidate_image is not None and targets.candidate_text is not None:
            n = targets.n_samples
            self.queue.push(
                targets.candidate_image[:n],
                targets.candidate_text[:n],
                targets.candidate_image_id[:n],
                targets.candidate_caption_id[:n],
            )
        if self.network.temperature is not None:
            with torch.no_grad():
                self.network.temperature.clamp_(0.001, 0.5)
