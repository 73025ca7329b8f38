"""One MLIM pre-training step: L = MLM + RECON (+ ITM) of one modality-aware masked pass (Arici et al. 2021).

Legend: B batch, L text tokens, P patches in a grid [h, w], S ITM pool size.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamo.distributed import all_reduce_sum
from mamo.losses.itc import positives
from mamo.losses.itm import draw_negatives, itm_loss
from mamo.losses.mlm import mlm_loss
from mamo.tasks.base import Parts, PixelNorm, Trained
from mamo.tasks.mlim.batch import MlimBatch, MlimCollator
from mamo.tasks.mlim.config import MlimConfig
from mamo.tasks.mlim.evaluate import evaluate_mlim, reconstructions
from mamo.tasks.mlim.losses import recon_loss
from mamo.tasks.mlim.network import Mlim, build_single_stream, load_published_single_stream
from mamo.tasks.sources import pair_dataset
from mamo.training.monitors import word_entropy


@dataclass(frozen=True, slots=True)
class Counts:
    """What the losses are shares of, over the global batch."""

    n_words: Tensor
    n_pixels: Tensor
    n_itm: Tensor


class MlimTask:
    """MLIM pre-training: one masked pass for MLM and RECON, and where ITM is on a clean one of twice the samples."""

    def __init__(self, config: MlimConfig, network: Mlim, normalise: PixelNorm) -> None:
        self.config = config
        self.network = network
        self.normalise = normalise
        self.weights = {name: weight for name, weight in config.losses.weights if weight > 0}

    def modules(self) -> dict[str, nn.Module]:
        """The network alone: MLIM has no teacher."""
        return {"student": self.network}

    def prepare(self, batch: MlimBatch, micro_batch_size: int, step: int) -> tuple[Counts, dict[str, Tensor]]:
        """Counts of the global batch."""
        height, width = batch.image.shape[-2:]
        n_patches = batch.is_masked_patch.sum()
        if self.config.losses.recon_area == "image":
            n_patches = torch.full_like(n_patches, batch.is_masked_patch.numel())
        n_negatives = (~self._pool_positives(batch).all(dim=2)).sum()
        counts = Counts(
            n_words=all_reduce_sum(batch.is_masked_word.sum()).clamp(min=1),
            n_pixels=all_reduce_sum(n_patches * (height * width // batch.is_masked_patch.shape[1])).clamp(min=1),
            n_itm=all_reduce_sum(len(batch) + n_negatives),
        )
        return counts, {}

    def losses(self, batch: MlimBatch, counts: Counts, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted losses and metrics of one micro-batch, both as shares of the global batch: they add up."""
        network, stream = self.network, self.network.backbone
        image = self.normalise(batch.image)
        masked_ids = batch.input_ids.masked_fill(batch.is_masked_word, stream.mask_token_id)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if network.mlm is not None or network.recon is not None:
            fused = stream(image, masked_ids, batch.is_valid, is_masked_patch=batch.is_masked_patch)
            patches, words = fused[:, : stream.n_patches], fused[:, stream.n_patches :]
            if network.mlm is not None:
                labels = batch.input_ids[batch.is_masked_word]
                logits = network.mlm(words[batch.is_masked_word])
                losses["mlm"] = mlm_loss(logits, labels, counts.n_words)
                metrics["mlm_accuracy"] = (logits.argmax(dim=1) == labels).sum() / counts.n_words
            if network.recon is not None:
                is_counted = None
                if self.config.losses.recon_area == "masked":
                    is_counted = batch.is_masked_patch.view(-1, *stream.embedder.grid)
                target = batch.image.float() / 255
                losses["recon"] = recon_loss(network.recon(patches), target, is_counted, counts.n_pixels)
        if network.itm is not None:
            losses["itm"], metrics["itm_accuracy"] = self._itm(network.itm, image, batch, counts)
        return losses, metrics

    def _pool_positives(self, batch: MlimBatch) -> Tensor:
        """bool [pools, S, S], True where two samples of a pool match each other."""
        size = self.config.losses.itm_pool_size if self.network.itm is not None else len(batch)
        ids = zip(torch.split(batch.image_id, size), torch.split(batch.caption_id, size))
        return torch.stack([positives(image, caption, image, caption) for image, caption in ids])

    def _itm(self, head: nn.Module, image: Tensor, batch: MlimBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        """Each image, unmasked, with its text and with a random other text of its pool: no ITC ranks them."""
        n, is_positive = len(batch), self._pool_positives(batch)
        size = is_positive.shape[1]
        noise = batch.itm_noise.view(-1, size, size)
        negative, has_negative = draw_negatives(torch.zeros_like(noise), is_positive, noise)
        first = torch.arange(0, n, size, device=image.device)[:, None]
        own = torch.arange(n, device=image.device)
        text = torch.cat([own, (negative + first).flatten()])
        stream = self.network.backbone
        tokens = stream(torch.cat([image, image]), batch.input_ids[text], batch.is_valid[text])
        logits = head(stream.cls(tokens))
        is_match = torch.arange(2 * n, device=image.device) < n
        is_counted = torch.cat([torch.ones_like(own, dtype=torch.bool), has_negative.flatten()])
        hits = ((logits.argmax(dim=1) == is_match.long()) & is_counted).sum() / counts.n_itm
        return itm_loss(logits, is_match, is_counted, counts.n_itm), hits

    def after_step(self, batch: MlimBatch, counts: Counts, step: int) -> None:
        """No further state."""


def mlim_parts(config: MlimConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """Image-text pairs in; masked words by class and the error of reconstructed images out."""
    weights = config.losses.weights
    stream = build_single_stream(config, tokenizer)
    network = Mlim(stream, mlm=weights.mlm > 0, recon=weights.recon > 0, itm=weights.itm > 0)
    load_published_single_stream(config, network)

    def baselines(batch: MlimBatch) -> dict[str, float]:
        # one match and one mismatch a sample
        return {"loss/mlm": word_entropy(tokenizer, batch.input_ids, batch.is_valid), "loss/itm": math.log(2)}

    def evaluate(trained: Trained, folder: Path) -> dict[str, float]:
        return evaluate_mlim(config, network, trained.tokenizer, trained.normalise, trained.device)

    def pictures(trained: Trained, rows: int, folder: Path) -> list[tuple[str, str]]:
        return reconstructions(config, network, trained.tokenizer, trained.normalise, trained.device, rows)

    return Parts(
        network=network,
        image_encoder=stream.embedder,
        source=functools.partial(pair_dataset, config),
        collator=MlimCollator(
            tokenizer,
            config.data.text_max_tokens,
            config.masking,
            stream.embedder.grid,
            config.losses.itm_pool_size,
            config.seed,
        ),
        task=functools.partial(MlimTask, config, network),
        evaluate=evaluate,
        baselines=baselines,
        pictures=pictures,
    )
