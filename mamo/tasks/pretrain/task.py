"""One MAMO pre-training step: L = ITC + ITM + MLM + MIM + MRM (the paper's Eq. 6).

Legend: B batch, L text tokens, P patches, K masked slots, D width of fusion, N ITC candidates, S ITM pool size.

Passes (`masking.mode: alternate`, the paper's figure):
    target        teacher, clean pair                      -> ITC candidates, MIM features, MRM tokens
                  teacher, clean image + masked caption    -> MLM soft targets (`losses.mlm_soft_target_alpha`)
    masked image  online, visible patches + clean caption  -> MIM, MRM at masked patches
    masked text   online, clean image + masked caption     -> MLM, MRM at masked words
    matching      online, clean pairs + hard negatives     -> ITC (unimodal), ITM (fused)
`joint` replaces the two masked passes by one with both masked. Clean image and clean caption are encoded once.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mamo.distributed import all_gather_no_grad, all_reduce_sum, rank, world_size
from mamo.losses.mim import mim_loss
from mamo.losses.mlm import mlm_loss
from mamo.losses.mrm import mrm_loss
from mamo.models.fusion import Fusion
from mamo.models.vlm import Backbone, Mamo
from mamo.queue import FeatureQueue
from mamo.tasks.base import PixelNorm
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.contrast import itc_step, itm_step, pool_positives
from mamo.tasks.pretrain.targets import Targets, encode_texts, feature_std, fuse_and_split, linear_ramp, teacher_pass
from mamo.teacher import Teacher, momentum_at


class PretrainTask:
    """MAMO pre-training: `prepare` (teacher, no gradient), `losses` (each micro-batch), `after_step` (state moves)."""

    def __init__(self, config: PretrainConfig, network: Mamo, normalise: PixelNorm) -> None:
        self.config = config
        self.network = network
        self.normalise = normalise
        self.weights = {name: w for name, w in dict(config.losses.weights).items() if w > 0}
        self.teacher = Teacher(network.backbone, network.mlm if config.losses.mlm_soft_target_alpha > 0 else None)
        self.queue = FeatureQueue(config.losses.queue_size, config.model.itc_width)
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
        teacher, losses = self.teacher.module, self.config.losses
        assert isinstance(teacher, Backbone)
        micro_batches = [batch.part(i, i + micro_batch_size) for i in range(0, len(batch), micro_batch_size)]
        parts = [teacher_pass(self.config, teacher, part, self.normalise(part.image)) for part in micro_batches]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        image_id, caption_id = all_gather_no_grad(batch.image_id), all_gather_no_grad(batch.caption_id)
        is_filled = torch.ones_like(image_id, dtype=torch.bool)
        candidate_image = candidate_text = None
        metrics = {}
        if "image_feature" in joined:
            candidate_image, candidate_text = (
                all_gather_no_grad(joined["image_feature"]),
                all_gather_no_grad(joined["text_feature"]),
            )
            metrics["teacher_spread/image"] = feature_std(candidate_image)
            metrics["teacher_spread/text"] = feature_std(candidate_text)
            candidate_image = torch.cat([candidate_image, self.queue.image_feature])
            candidate_text = torch.cat([candidate_text, self.queue.text_feature])
            image_id = torch.cat([image_id, self.queue.image_id])
            caption_id = torch.cat([caption_id, self.queue.caption_id])
            is_filled = torch.cat([is_filled, self.queue.is_filled()])
        for name in ("fused_text", "fused_image"):
            if name in joined:
                fused = all_gather_no_grad(functional.normalize(joined[name][:, 0].float(), dim=-1))
                metrics[f"teacher_spread/{name}"] = feature_std(fused)
        has_negative = ~pool_positives(batch, losses.itm_pool_size if self.needs("itm") else len(batch)).all(dim=2)
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
            masked_words=joined.get("masked_words"),
            first=rank() * len(batch),
            itc_alpha=linear_ramp(losses.itc_soft_target_alpha, losses.itc_soft_target_ramp_steps, step),
            mlm_alpha=linear_ramp(losses.mlm_soft_target_alpha, losses.mlm_soft_target_ramp_steps, step),
            n_samples=self.config.training.batch_size_global,
            n_masked_words=all_reduce_sum(batch.text_slot_is_valid.sum()).clamp(min=1),
            n_itm=all_reduce_sum(len(batch) + 2 * has_negative.sum()),
        )
        return targets, metrics

    # ---- the online passes ------------------------------------------------------------------------------------------

    def losses(self, batch: PairBatch, targets: Targets, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted losses and metrics of one micro-batch, both as shares of the global batch: they add up.

        Args:
            batch: samples `start` to `start + len(batch)` of the process's batch that `targets` was prepared from.
        """
        backbone, fusion = self.network.backbone, self.network.backbone.fusion
        is_joint = self.config.masking.mode == "joint"
        masks_text = self.needs("mlm", "mrm_text") or (is_joint and self.needs("mim", "mrm_image"))
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        patches = backbone.image_encoder.embed(self.normalise(batch.image))
        clean_text, masked_text = encode_texts(backbone, batch, clean=True, masked=masks_text)
        assert clean_text is not None

        clean_slots = None
        if self.needs("itc", "itm") or (masks_text and not is_joint):
            clean_image = backbone.image_encoder.encode(patches)
            if self.needs("itm") or (masks_text and not is_joint):
                clean_slots = fusion.embed_image(clean_image)
            features = backbone.image_feature(clean_image), backbone.text_feature(clean_text)
            temperature = self._temperature()
            if self.needs("itc"):
                losses["itc"], metrics["itc_accuracy"] = itc_step(features, temperature, batch, targets, start)
            if clean_slots is not None and self.needs("itm"):
                losses["itm"], metrics["itm_accuracy"] = self.itm(*features, clean_slots, clean_text, batch, targets)

        fused = self._masked_passes(batch, patches, clean_slots, clean_text, masked_text)
        part = slice(start, start + len(batch))
        if "image" in fused:
            losses |= self._image_losses(fused["image"], targets, part)
        if "text" in fused:
            text_losses, text_metrics = self._text_losses(fused["text"], batch, targets, part)
            losses |= text_losses
            metrics |= text_metrics
        return losses, metrics

    def itm(
        self,
        image_feature: Tensor,
        text_feature: Tensor,
        embedded: Tensor,
        text: Tensor,
        batch: PairBatch,
        targets: Targets,
    ) -> tuple[Tensor, Tensor]:
        """ITM loss and accuracy: hard negatives from the pool. `embedded` images, `text` float [B, L, D] encoded."""
        words = self.network.backbone.fusion.embed_text(text, batch.is_valid)
        features, size = (image_feature, text_feature), self.config.losses.itm_pool_size
        return itm_step(self.network, features, self._temperature(), embedded, words, batch, targets, size)

    def _masked_passes(
        self,
        batch: PairBatch,
        patches: Tensor,
        clean_slots: Tensor | None,
        clean_text: Tensor,
        masked_text: Tensor | None,
    ) -> dict[str, Tensor]:
        """Fused tokens at masked patches (`image`) and masked words (`text`), as far as a loss reads them."""
        backbone, fusion = self.network.backbone, self.network.backbone.fusion
        is_joint = self.config.masking.mode == "joint"
        at_image, at_text = {}, {}
        if self.needs("mim", "mrm_image"):
            assert isinstance(fusion, Fusion)  # the config refuses the other
            at_image["image"] = fusion.patch_positions(batch.masked_patches)
        if self.needs("mlm", "mrm_text"):
            at_text["text"] = fusion.text_positions(batch.text_slots)
        fused: dict[str, Tensor] = {}
        if at_image or (at_text and is_joint):
            visible = backbone.image_encoder.encode(patches, batch.visible_patches)
            masked_slots = fusion.embed_image(visible, batch.visible_patches)
            text, wanted = clean_text, at_image
            if is_joint and masked_text is not None:
                text, wanted = masked_text, at_image | at_text
            fused |= fuse_and_split(fusion, masked_slots, text, batch.is_valid, wanted)
        if masked_text is not None and clean_slots is not None and not is_joint:
            fused |= fuse_and_split(fusion, clean_slots, masked_text, batch.is_valid, at_text)
        return fused

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
            guess, alpha = None, targets.mlm_alpha
            if alpha > 0 and targets.masked_words is not None and self.teacher.mlm is not None:
                with torch.no_grad():
                    guess = self.teacher.mlm(targets.masked_words[part][is_valid]).float().softmax(dim=1)
            losses["mlm"] = mlm_loss(logits, labels, targets.n_masked_words, guess, alpha)
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

    # ---- state ------------------------------------------------------------------------------------------------------

    def after_step(self, batch: PairBatch, targets: Targets, step: int) -> None:
        """Teacher, queue and temperature move here and nowhere else, once per optimizer step."""
        momentum = momentum_at(self.config.teacher, step, self.config.training.total_steps)
        self.teacher.update(self.network.backbone, momentum, self.network.mlm)
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
