"""Fine-tuning of MLIM on closely matching items: are two listings of a catalogue of the same item?

Legend: B pairs.
"""

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mamo.evaluation.scorer import eval_mode
from mamo.tasks.base import Parts, PixelNorm, Trained
from mamo.tasks.mlim.config import MatchingConfig
from mamo.tasks.mlim.matching_batch import CataloguePairs, ListingBatch, ListingCollator
from mamo.tasks.mlim.matching_evaluate import pr_auc, predict_matching
from mamo.tasks.mlim.network import Mlim, build_single_stream, load_published_single_stream
from mamo.training.monitors import class_entropy


class MatchingTask:
    """Same item or not; `losses` has the one loss, `match`."""

    def __init__(self, config: MatchingConfig, network: Mlim, normalise: PixelNorm) -> None:
        self.network = network
        self.normalise = normalise
        self.weights = {"match": 1.0}
        self.n_global = config.training.batch_size_global

    def modules(self) -> dict[str, nn.Module]:
        """The network alone."""
        return {"student": self.network}

    def prepare(self, batch: ListingBatch, micro_batch_size: int, step: int) -> tuple[None, dict[str, Tensor]]:
        """Nothing to prepare."""
        return None, {}

    def losses(self, batch: ListingBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two-class cross-entropy and accuracy of one micro-batch, as shares of the global batch."""
        given = (batch.input_ids, batch.is_valid, batch.has_image, batch.has_text)
        logits = self.network.match_items(self.normalise(batch.image), *given)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.is_match.float(), reduction="sum")
        hits = ((logits > 0) == batch.is_match).sum()
        return {"match": loss / self.n_global}, {"match_accuracy": hits / self.n_global}

    def after_step(self, batch: ListingBatch, targets: None, step: int) -> None:
        """No further state."""


def matching_parts(config: MatchingConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """Pairs of listings in; PR AUC with both modalities, images alone and texts alone out."""
    network = Mlim(build_single_stream(config, tokenizer), match=True)
    load_published_single_stream(config, network)
    collate = functools.partial(ListingCollator, tokenizer, config.data.text_max_tokens)
    return Parts(
        network=network,
        image_encoder=network.backbone.embedder,
        source=functools.partial(CataloguePairs, config.data, "train", config.data.train_scenes),
        collator=collate(config.matching.modality_dropout, config.seed),
        task=functools.partial(MatchingTask, config, network),
        evaluate=functools.partial(evaluate_matching, config, collate(0.0, config.seed)),
        baselines=lambda batch: {"loss/match": class_entropy(batch.is_match)},
    )


def evaluate_matching(
    config: MatchingConfig, collator: ListingCollator, trained: Trained, folder: Path
) -> dict[str, float]:
    """`matching/pr_auc/both|image_only|text_only` and `matching/pr_auc/random` of the test pairs, in percent.

    The same pairs are scored each time; a listing that lacks what alone is given shows nothing. `random` is what an
    order without meaning scores: the share of matches.
    """
    pairs = CataloguePairs(config.data, "test", config.evaluation.probe_items)
    network = trained.network
    assert isinstance(network, Mlim)
    with eval_mode(network):
        reading = (trained.normalise, trained.device, pairs, collator, config.evaluation.batch_size)
        logits, is_match = predict_matching(network, *reading)
    metrics = {f"matching/pr_auc/{modality}": pr_auc(score, is_match) for modality, score in logits.items()}
    return {**metrics, "matching/pr_auc/random": 100.0 * is_match.double().mean().item()}
