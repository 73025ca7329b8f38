"""The losses of MAMO (the paper's Eq. 6), each with its heads, views, targets and count.

Legend: B batch, L text tokens, K masked positions, M masked words, N ITC candidates, S ITM pool size, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mamo.distributed import all_gather_no_grad, rank
from mamo.losses.itc import itc_loss, itc_targets, positives, sigmoid_loss
from mamo.losses.itm import draw_negatives, itm_loss
from mamo.losses.mim import mim_loss
from mamo.losses.mlm import mlm_loss
from mamo.losses.mrm import mrm_loss
from mamo.losses.rows import masked_rows, word_labels
from mamo.models.fusion import index_rows
from mamo.models.heads import ITMHead, MIMHead, MLMHead, MRMHead
from mamo.models.vlm import Backbone, Mamo
from mamo.tasks.objective import Loss, LossAndMetrics, Part, Stage, Views
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.training.monitors import ITM_CLASS_PRIOR, word_entropy

Heads = dict[str, nn.Module | nn.Parameter]
TEMPERATURE_MIN, TEMPERATURE_MAX = 0.001, 0.5
SIGMOID_BIAS = -10.0
"""First value of the bias of sigmoid contrast: nearly all pairs are no match (SigLIP)."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The samples that ITC contrasts with: the global batch in rank order, then the queue.

    `image` and `text` are the teacher's features, float32 [N, D_itc]; None contrasts plainly in batch. `image_id` and
    `caption_ids` int64 [N, C]; `is_filled` bool [N], False at empty slots of the queue. `first` is the index of this
    process's first sample, `alpha` the share of the teacher's similarities in the target.
    """

    image: Tensor | None
    text: Tensor | None
    image_id: Tensor
    caption_ids: Tensor
    is_filled: Tensor
    first: int
    alpha: float


def linear_ramp(alpha: float, ramp_steps: int, step: int) -> float:
    """Return the share of soft targets at 0-based `step`: from 0 to `alpha` linearly over `ramp_steps`."""
    return alpha * (min(1.0, step / ramp_steps) if ramp_steps else 1.0)


def temperature_of(network: Mamo, config: PretrainConfig) -> Tensor:
    """Return the learned temperature, or without ITC, which learns it, the configured one."""
    learned = network.get_head("temperature")
    return torch.tensor(config.losses.temperature) if learned is None else learned


class Itc(Loss[PairBatch]):
    """Image-text contrast: cross-entropy of each side's feature against the other side's N candidates."""

    name = "itc"
    reads = ("image_feature", "text_feature")

    def __init__(self, config: PretrainConfig, settings: None = None) -> None:
        self.config = config
        if config.losses.itc_candidates == "teacher":
            self.targets = ("image_feature", "text_feature")

    def heads(self, backbone: nn.Module) -> Heads:
        """Add the learned temperature."""
        return {"temperature": nn.Parameter(torch.tensor(self.config.losses.temperature))}

    def check(self, world_size: int) -> None:
        """Refuse in-batch contrast over several processes."""
        if not self.targets and world_size > 1:
            raise ValueError(
                f"losses.itc_candidates: batch contrasts within one process, and this run has {world_size}; use teacher"
            )

    def prepare(self, task: Any, views: Views, batch: PairBatch, step: int) -> Candidates:
        """Gather the candidates."""
        losses, queue = self.config.losses, task.queue
        image_id, caption_ids = all_gather_no_grad(batch.image_id), all_gather_no_grad(batch.caption_ids)
        is_filled = torch.ones_like(image_id, dtype=torch.bool)
        image = text = None
        if self.targets:
            image, text = (all_gather_no_grad(views[name]) for name in self.targets)
            image, text = torch.cat([image, queue.image_feature]), torch.cat([text, queue.text_feature])
            image_id, caption_ids = torch.cat([image_id, queue.image_id]), torch.cat([caption_ids, queue.caption_ids()])
            is_filled = torch.cat([is_filled, queue.is_filled()])
        alpha = linear_ramp(losses.itc_soft_target_alpha, losses.itc_soft_target_ramp_steps, step)
        return Candidates(image, text, image_id, caption_ids, is_filled, rank() * len(batch), alpha)

    def __call__(
        self, network: Mamo, part: Part[PairBatch], n_global: Tensor, fixed: Candidates
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of both directions, and the accuracy of image to text."""
        batch, features = part.batch, [part.views[name] for name in self.reads]
        candidates = [own if theirs is None else theirs for own, theirs in zip(features, (fixed.image, fixed.text))]
        temperature = temperature_of(network, self.config)
        positive_index = torch.arange(len(batch), device=features[0].device) + fixed.first + part.start
        is_excluded = ~fixed.is_filled.expand(len(batch), -1)
        if self.config.losses.duplicates == "excluded":
            same = positives(batch.image_id, batch.caption_ids, fixed.image_id, fixed.caption_ids)
            is_excluded = same | is_excluded
        is_excluded = is_excluded.scatter(1, positive_index[:, None], False)
        logits = [features[0] @ candidates[1].t() / temperature, features[1] @ candidates[0].t() / temperature]
        teacher_logits = logits  # not read at alpha 0
        if fixed.alpha > 0:
            teacher_logits = [
                part.targets["image_feature"] @ candidates[1].t() / temperature.detach(),
                part.targets["text_feature"] @ candidates[0].t() / temperature.detach(),
            ]
        image_loss, text_loss = (
            self.compare(network, logit, (teacher_logit.detach(), fixed.alpha), positive_index, is_excluded, n_global)
            for logit, teacher_logit in zip(logits, teacher_logits)
        )
        num_correct = (logits[0].detach().masked_fill(is_excluded, -torch.inf).argmax(dim=1) == positive_index).sum()
        return (image_loss + text_loss) / 2, {"itc_accuracy": num_correct / n_global}

    def compare(
        self,
        network: Mamo,
        logits: Tensor,
        teacher: tuple[Tensor, float],
        positive_index: Tensor,
        is_excluded: Tensor,
        n_global: Tensor,
    ) -> Tensor:
        """Compute one direction from logits float [B, N]; `teacher` are its logits and their share in the target."""
        targets = itc_targets(teacher[0], positive_index, is_excluded, teacher[1])
        return itc_loss(logits, targets, is_excluded, n_global)

    def after_step(self, task: Any, fixed: Candidates) -> None:
        """Push the global batch into the queue and clamp the temperature."""
        if fixed.image is not None and fixed.text is not None:
            n = len(fixed.image) - task.queue.size
            task.queue.push(fixed.image[:n], fixed.text[:n], fixed.image_id[:n], fixed.caption_ids[:n])
        with torch.no_grad():
            task.network.temperature.clamp_(TEMPERATURE_MIN, TEMPERATURE_MAX)

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return log N."""
        n = self.config.training.batch_size_global + self.config.losses.queue_size
        return float(torch.tensor(float(n)).log())


class SigmoidItc(Itc):
    """Image-text contrast of each pair by itself, with a learned bias (SigLIP)."""

    def heads(self, backbone: nn.Module) -> Heads:
        """Add the learned temperature and bias."""
        return super().heads(backbone) | {"itc_bias": nn.Parameter(torch.tensor(SIGMOID_BIAS))}

    def compare(
        self,
        network: Mamo,
        logits: Tensor,
        teacher: tuple[Tensor, float],
        positive_index: Tensor,
        is_excluded: Tensor,
        n_global: Tensor,
    ) -> Tensor:
        """See `Itc.compare`; targets are hard."""
        return sigmoid_loss(logits + network.get_head("itc_bias"), positive_index, is_excluded, n_global)

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return the loss of one probability for all of N candidates, 1 / N: log N + (N - 1) log(N / (N - 1))."""
        n = self.config.training.batch_size_global + self.config.losses.queue_size
        return math.log(n) + (n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0


def pool_positives(batch: PairBatch, size: int) -> Tensor:
    """Return bool [B / S, S, S], True where two samples of a pool of `size` consecutive ones match each other."""
    same = positives(batch.image_id, batch.caption_ids, batch.image_id, batch.caption_ids)  # [B, B]
    pools = same.view(len(batch) // size, size, len(batch) // size, size)
    return pools.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def own_pairs(batch: PairBatch, size: int) -> Tensor:
    """Return bool [B / S, S, S], True where a sample meets itself."""
    own = torch.eye(size, dtype=torch.bool, device=batch.image_id.device)
    return own.expand(len(batch) // size, size, size)


class Itm(Loss[PairBatch]):
    """Image-text matching: each pair, each image with a hard negative text, each text with a hard negative image.

    A negative is drawn with probability proportional to exp(ITC similarity / temperature) within its pool, as in ALBEF,
    which takes the online features' similarity to the teacher's; here both sides are online, so that ITM does not need
    the teacher. In the first `losses.itm_uniform_steps` steps all of a pool's negatives are equally probable: the hard
    ones hide from ITM what ITC has learned, that the similar pair is the match.
    """

    name = "itm"
    reads = ("itm_cls", "itm_is_valid")
    unit_key = "losses.itm_pool_size"

    def __init__(self, config: PretrainConfig, settings: None = None) -> None:
        self.config = config
        self.unit = config.losses.itm_pool_size
        self.hardness = 1.0
        """Factor of the similarity by which negatives are drawn in this step."""
        self.matches = pool_positives if config.losses.duplicates == "excluded" else own_pairs

    def heads(self, backbone: Backbone) -> Heads:  # type: ignore[override]
        """Add the matching head."""
        return {"itm": ITMHead(backbone.fusion.width)}

    def stages(self) -> tuple[Stage, ...]:
        """Fuse 3 B pairs and read their [CLS]."""
        needs = ("whole", "clean_words", "image_feature", "text_feature")
        return (Stage(("itm_cls", "itm_is_valid"), self._fuse, needs),)

    def prepare(self, task: Any, views: Views, batch: PairBatch, step: int) -> None:
        """Choose between uniform and hard negatives."""
        self.hardness = 0.0 if step < self.config.losses.itm_uniform_steps else 1.0

    def _fuse(self, network: Mamo, batch: PairBatch, views: Views, wanted: frozenset[str]) -> Views:
        """Return `itm_cls` float [3 B, D] and `itm_is_valid` bool [3 B]: matches, negative texts, negative images."""
        n, size, fusion = len(batch), self.unit, network.backbone.fusion
        text = fusion.embed_text(views["clean_words"], batch.is_valid)
        is_positive = self.matches(batch, size)
        with torch.no_grad():
            images, texts = (views[name].view(n // size, size, -1) for name in ("image_feature", "text_feature"))
            similarity = images @ texts.transpose(1, 2) / temperature_of(network, self.config)  # [pools, S, S]
            similarity = similarity * self.hardness
            noise = batch.itm_noise.view(-1, size, 2, size)
            text_negative, has_text = draw_negatives(similarity, is_positive, noise[:, :, 0])
            image_negative, has_image = draw_negatives(similarity.transpose(1, 2), is_positive, noise[:, :, 1])
        first = torch.arange(0, n, size, device=text.device)[:, None]
        text_rows, image_indices = (text_negative + first).flatten(), (image_negative + first).flatten()
        own = torch.arange(n, device=text.device)
        text_choice = torch.cat([own, text_rows, own])  # the first two of three with their own images
        cls = fusion.text_positions(torch.zeros(3 * n, 1, dtype=torch.int64, device=text.device))
        words = index_rows(text, text_choice)
        fused = fusion.fuse(views["whole"], words, batch.is_valid[text_choice], cls, image_indices)
        is_valid = torch.cat([torch.ones_like(own, dtype=torch.bool), has_text.flatten(), has_image.flatten()])
        return {"itm_cls": fused[:, 0], "itm_is_valid": is_valid}

    def count(self, batch: PairBatch) -> Tensor | int:
        """Count the pairs: a sample whose whole pool matches it has no negative."""
        return len(batch) + 2 * (~self.matches(batch, self.unit).all(dim=2)).sum()

    def __call__(self, network: Mamo, part: Part[PairBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the two-class cross-entropy and the accuracy."""
        logits, is_valid = network.itm(part.views["itm_cls"]), part.views["itm_is_valid"]
        is_match = torch.arange(len(logits), device=logits.device) < len(part.batch)
        num_correct = ((logits.argmax(dim=1) == is_match.long()) & is_valid).sum()
        return itm_loss(logits, is_match, is_valid, n_global), {"itm_accuracy": num_correct / n_global}

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return the entropy of the class prior, one match in three."""
        return ITM_CLASS_PRIOR


class Mim(Loss[PairBatch]):
    """Predict the teacher's image features, those of a frozen encoder, or pixels, at masked patches (Eq. 4)."""

    name = "mim"
    reads = ("fused_patches",)

    def __init__(self, config: PretrainConfig, settings: None = None) -> None:
        self.config = config
        self.targets = (f"patch_{config.losses.mim_target}",)
        self.width_of_encoder: Callable[[Backbone], int] | None = None
        """Returns the features of the frozen encoder, with `losses.mim_target: encoder`; set by the task."""

    def heads(self, backbone: Backbone) -> Heads:  # type: ignore[override]
        """Add the prediction head, as wide as its target."""
        encoder, fusion = backbone.image_encoder, backbone.fusion
        patch_h, patch_w = encoder.patch_size_px
        width = encoder.width if self.config.losses.mim_target == "features" else 3 * patch_h * patch_w
        if self.width_of_encoder is not None:
            width = self.width_of_encoder(backbone)
        return {"mim": MIMHead(fusion.width, width, self.config.model.mim_head_blocks, fusion.heads)}

    def count(self, batch: PairBatch) -> int:
        """Count the masked patches."""
        return batch.masked_patches.numel()

    def __call__(self, network: Mamo, part: Part[PairBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the squared error."""
        (target,) = self.targets
        return mim_loss(network.mim(part.views["fused_patches"]), part.targets[target], n_global), {}


class MrmImage(Loss[PairBatch]):
    """Predict the teacher's fused tokens of the whole pair at masked patches."""

    name = "mrm_image"
    reads = targets = ("fused_patches",)

    def heads(self, backbone: Backbone) -> Heads:  # type: ignore[override]
        """Add the predictor."""
        return {"mrm_image": MRMHead(backbone.fusion.width, backbone.fusion.width)}

    def count(self, batch: PairBatch) -> int:
        """Count the masked patches."""
        return batch.masked_patches.numel()

    def __call__(self, network: Mamo, part: Part[PairBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the squared distance of unit vectors."""
        prediction = network.mrm_image(part.views["fused_patches"])
        return mrm_loss(prediction, part.targets["fused_patches"], n_global), {}


class Mlm(Loss[PairBatch]):
    """Predict masked words; with `losses.mlm_soft_target_alpha` also the teacher's word probabilities (ALBEF)."""

    name = "mlm"
    reads = ("fused_words",)

    def __init__(self, config: PretrainConfig, settings: None = None) -> None:
        self.alpha, self.ramp_steps = config.losses.mlm_soft_target_alpha, config.losses.mlm_soft_target_ramp_steps
        if self.alpha > 0:
            self.targets = ("word_probs",)

    def heads(self, backbone: Backbone) -> Heads:  # type: ignore[override]
        """Add the masked-word head, which shares the word embeddings."""
        fusion = backbone.fusion
        return {"mlm": MLMHead(fusion.width, backbone.text_encoder.word_embeddings, fusion.layer_norm_eps)}

    def count(self, batch: PairBatch) -> Tensor:
        """Count the masked words."""
        return batch.text_slot_is_valid.sum()

    def prepare(self, task: Any, views: Views, batch: PairBatch, step: int) -> float:
        """Return the share of the teacher's probabilities in the target."""
        return linear_ramp(self.alpha, self.ramp_steps, step)

    def __call__(self, network: Mamo, part: Part[PairBatch], n_global: Tensor, fixed: float) -> LossAndMetrics:
        """Return the cross-entropy over the vocabulary and the accuracy."""
        batch = part.batch
        is_valid = batch.text_slot_is_valid
        labels = word_labels(batch.input_ids.gather(1, batch.text_slots), is_valid)
        logits = network.mlm(part.views["fused_words"])
        teacher_probs = masked_rows(part.targets["word_probs"], is_valid) if fixed > 0 else None
        loss = mlm_loss(logits, labels, n_global, teacher_probs, fixed)
        return loss, {"mlm_accuracy": (logits.argmax(dim=1) == labels).sum() / n_global}

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: PairBatch) -> float:
        """Return the unigram entropy of the words."""
        return word_entropy(tokenizer, batch.input_ids, batch.is_valid)


class MrmText(Loss[PairBatch]):
    """Predict the teacher's fused tokens of the whole pair at masked words."""

    name = "mrm_text"
    reads = targets = ("fused_words",)

    def heads(self, backbone: Backbone) -> Heads:  # type: ignore[override]
        """Add the predictor."""
        return {"mrm_text": MRMHead(backbone.fusion.width, backbone.fusion.width)}

    def count(self, batch: PairBatch) -> Tensor:
        """Count the masked words."""
        return batch.text_slot_is_valid.sum()

    def __call__(self, network: Mamo, part: Part[PairBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the squared distance of unit vectors."""
        prediction = network.mrm_text(part.views["fused_words"])
        is_valid = part.batch.text_slot_is_valid
        target = masked_rows(part.targets["fused_words"], is_valid)
        return mrm_loss(prediction, target, n_global, masked_rows(is_valid, is_valid)), {}


LOSSES: tuple[type[Loss], ...] = (Itc, Itm, Mim, MrmImage, Mlm, MrmText)
"""In the order of their passes."""


def sphere_spread(features: Tensor) -> Tensor:
    """Return the mean standard deviation per dimension of unit vectors [N, D], times sqrt(D).

    1 is spread evenly over the sphere, 0 is collapsed.
    """
    mean: Tensor = features.std(dim=0, correction=0).mean()
    return mean * math.sqrt(features.shape[1])
