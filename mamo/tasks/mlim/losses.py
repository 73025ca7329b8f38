"""The losses of MLIM: masked words, reconstructed pixels, and optionally matching.

Legend: B batch, L text tokens, P patches in a grid [h, w], M masked words, S ITM pool size.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mamo.losses.itc import positives
from mamo.losses.itm import draw_negatives, itm_loss
from mamo.losses.mlm import mlm_loss
from mamo.losses.rows import masked_rows, word_labels
from mamo.models.fusion import LAYER_NORM_EPS
from mamo.models.heads import ITMHead, MLMHead
from mamo.models.text_layouts import FUSION_EPS
from mamo.tasks.mlim.batch import MlimBatch
from mamo.tasks.mlim.config import MlimConfig
from mamo.tasks.mlim.network import ImageDecoder, Mlim, SingleStream
from mamo.tasks.objective import Loss, LossAndMetrics, Part, Stage, Views
from mamo.training.monitors import word_entropy

Heads = dict[str, nn.Module | nn.Parameter]


def masked_stage() -> Stage:
    """Return the modality-aware masked pass: `patches` float [B, P, D] and `words` float [B, L, D]."""
    return Stage(("patches", "words"), _masked_stream)


def _masked_stream(network: Mlim, batch: MlimBatch, views: Views, wanted: frozenset[str]) -> Views:
    stream = network.backbone
    masked_ids = batch.input_ids.masked_fill(batch.is_masked_word, stream.mask_token_id)
    fused = stream(batch.image, masked_ids, batch.is_valid, is_masked_patch=batch.is_masked_patch)
    return {"patches": fused[:, : stream.n_patches], "words": fused[:, stream.n_patches :]}


class MlimMlm(Loss[MlimBatch]):
    """Predict masked words."""

    name = "mlm"
    reads = ("words",)

    def heads(self, backbone: SingleStream) -> Heads:  # type: ignore[override]
        """Add the masked-word head."""
        text = backbone.text_encoder
        return {"mlm": MLMHead(text.width, text.word_embeddings, getattr(text.config, FUSION_EPS, LAYER_NORM_EPS))}

    def count(self, batch: MlimBatch) -> Tensor:
        """Count the masked words."""
        return batch.is_masked_word.sum()

    def __call__(self, network: Mlim, part: Part[MlimBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the cross-entropy and the accuracy."""
        batch = part.batch
        labels = word_labels(batch.input_ids, batch.is_masked_word)
        logits = network.mlm(masked_rows(part.views["words"], batch.is_masked_word))
        accuracy = (logits.argmax(dim=1) == labels).sum() / n_global
        return mlm_loss(logits, labels, n_global), {"mlm_accuracy": accuracy}

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: MlimBatch) -> float:
        """Return the unigram entropy of the words."""
        return word_entropy(tokenizer, batch.input_ids, batch.is_valid)


class Recon(Loss[MlimBatch]):
    """Rebuild pixels from the patches' outputs; `losses.recon_area` says which count."""

    name = "recon"
    reads = ("patches",)

    def __init__(self, config: MlimConfig, settings: None = None) -> None:
        self.counts_masked_only = config.losses.recon_area == "masked"

    def heads(self, backbone: SingleStream) -> Heads:  # type: ignore[override]
        """Add the decoder of pixels."""
        embedder = backbone.embedder
        return {"recon": ImageDecoder(embedder.width, embedder.grid, len(embedder.convolutions))}

    def count(self, batch: MlimBatch) -> Tensor:
        """Count the pixels."""
        height, width = batch.image.shape[-2:]
        n_patches = batch.is_masked_patch.sum()
        if not self.counts_masked_only:
            n_patches = torch.full_like(n_patches, batch.is_masked_patch.numel())
        return n_patches * (height * width // batch.is_masked_patch.shape[1])

    def __call__(self, network: Mlim, part: Part[MlimBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the squared error."""
        batch = part.batch
        is_counted = None
        if self.counts_masked_only:
            is_counted = batch.is_masked_patch.view(-1, *network.backbone.embedder.grid)
        return recon_loss(network.recon(part.views["patches"]), batch.image.float() / 255, is_counted, n_global), {}


class RandomItm(Loss[MlimBatch]):
    """Match each image, unmasked, with its text and with a random other text of its pool: no ITC ranks them."""

    name = "itm"
    reads = ("itm_cls", "itm_is_valid")
    unit_key = "losses.itm_pool_size"

    def __init__(self, config: MlimConfig, settings: None = None) -> None:
        self.unit = config.losses.itm_pool_size

    def heads(self, backbone: SingleStream) -> Heads:  # type: ignore[override]
        """Add the matching head."""
        return {"itm": ITMHead(backbone.embedder.width)}

    def stages(self) -> tuple[Stage, ...]:
        """Pass 2 B clean pairs through the stream."""
        return (Stage(("itm_cls", "itm_is_valid"), self._stream),)

    def _pool_positives(self, batch: MlimBatch) -> Tensor:
        """Return bool [pools, S, S], True where two samples of a pool match each other."""
        ids = zip(torch.split(batch.image_id, self.unit), torch.split(batch.caption_ids, self.unit))
        return torch.stack([positives(image, caption, image, caption) for image, caption in ids])

    def _stream(self, network: Mlim, batch: MlimBatch, views: Views, wanted: frozenset[str]) -> Views:
        n, stream = len(batch), network.backbone
        noise = batch.itm_noise.view(-1, self.unit, self.unit)
        negative, has_negative = draw_negatives(torch.zeros_like(noise), self._pool_positives(batch), noise)
        first = torch.arange(0, n, self.unit, device=noise.device)[:, None]
        own = torch.arange(n, device=noise.device)
        text = torch.cat([own, (negative + first).flatten()])
        tokens = stream(torch.cat([batch.image, batch.image]), batch.input_ids[text], batch.is_valid[text])
        is_valid = torch.cat([torch.ones_like(own, dtype=torch.bool), has_negative.flatten()])
        return {"itm_cls": stream.cls(tokens), "itm_is_valid": is_valid}

    def count(self, batch: MlimBatch) -> Tensor:
        """Count the pairs: a sample whose whole pool matches it has no negative."""
        return len(batch) + (~self._pool_positives(batch).all(dim=2)).sum()

    def __call__(self, network: Mlim, part: Part[MlimBatch], n_global: Tensor, fixed: None) -> LossAndMetrics:
        """Return the two-class cross-entropy and the accuracy."""
        logits, is_valid = network.itm(part.views["itm_cls"]), part.views["itm_is_valid"]
        is_match = torch.arange(len(logits), device=logits.device) < len(part.batch)
        num_correct = ((logits.argmax(dim=1) == is_match.long()) & is_valid).sum()
        return itm_loss(logits, is_match, is_valid, n_global), {"itm_accuracy": num_correct / n_global}

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: MlimBatch) -> float:
        """Return log 2: one match and one mismatch a sample."""
        return math.log(2)


def recon_loss(prediction: Tensor, image: Tensor, is_counted: Tensor | None, n_global: Tensor | int) -> Tensor:
    """Return squared error summed over the colours of a pixel, summed over counted pixels / n_global.

    Args:
        prediction: float [B, 3, H, W].
        image: float [B, 3, H, W], values 0 to 1.
        is_counted: bool [B, h, w], the patches whose pixels count; None counts the whole image.
        n_global: counted pixels of the global batch.
    """
    error = torch.square(prediction.float() - image.float()).sum(dim=1)  # [B, H, W]
    if is_counted is not None:
        height, width = (pixels // patches for pixels, patches in zip(error.shape[1:], is_counted.shape[1:]))
        error = error * is_counted.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
    return error.sum() / n_global
