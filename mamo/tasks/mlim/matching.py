"""Fine-tuning of MLIM on closely matching items: are two listings of a catalogue of the same item?

Legend: B pairs.
"""

from pathlib import Path

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.evaluation.predictor import Predictor
from mamo.evaluation.scorer import eval_mode
from mamo.tasks.base import Task
from mamo.tasks.mlim.config import MatchingConfig
from mamo.tasks.mlim.matching_batch import CataloguePairs, ListingBatch, ListingCollator
from mamo.tasks.mlim.matching_evaluate import pr_auc, predict_matching
from mamo.tasks.mlim.network import ItemPairHead, Mlim, PixelEmbedder, build_single_stream, load_published_single_stream
from mamo.training.monitors import class_entropy


class MatchingTask(Task[ListingBatch, None]):
    """Same item or not; the one loss is `match`."""

    config_type = MatchingConfig
    config: MatchingConfig
    has_api = False
    network: Mlim

    def __init__(self, config: MatchingConfig, tokenizer: PreTrainedTokenizerFast, stored: Path | None = None) -> None:
        super().__init__(config, tokenizer, stored)
        stream = build_single_stream(config, tokenizer)
        self.network = Mlim(stream, {"match": ItemPairHead(stream.embedder.width)})
        load_published_single_stream(config, self.network)
        self.weights = {"match": 1.0}
        self.collator = ListingCollator(
            tokenizer, config.data.text_max_tokens, config.matching.modality_dropout, config.seed
        )

    def train_dataset(self) -> CataloguePairs:
        """Open the training pairs of listings."""
        return CataloguePairs(self.config.data, "train", self.config.data.train_scenes)

    def losses(self, batch: ListingBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the two-class cross-entropy and the accuracy."""
        n_global = self.config.training.batch_size_global
        logits = self.network.match_items(batch.image, batch.input_ids, batch.is_valid, batch.has_image, batch.has_text)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.is_match.float(), reduction="sum")
        num_correct = ((logits > 0) == batch.is_match).sum()
        return {"match": loss / n_global}, {"match_accuracy": num_correct / n_global}

    def trivial_losses(self, batch: ListingBatch) -> dict[str, float]:
        """Return the entropy of the labels."""
        return {"loss/match": class_entropy(batch.is_match)}

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Compute `matching/pr_auc/both|image_only|text_only|random` of the test pairs, in percent.

        The same pairs are scored each time; of a listing without the one modality that is kept, nothing is seen.
        `random` is the score of an order without meaning: the share of matches.
        """
        config = self.config
        pairs = CataloguePairs(config.data, "test", config.evaluation.probe_items)
        collator = ListingCollator(self.tokenizer, config.data.text_max_tokens, 0.0, config.seed)
        with eval_mode(predictor.network):
            logits, is_match = predict_matching(predictor, pairs, collator, config.evaluation.batch_size)
        metrics = {f"matching/pr_auc/{modality}": pr_auc(score, is_match) for modality, score in logits.items()}
        return {**metrics, "matching/pr_auc/random": 100.0 * is_match.double().mean().item()}

    @property
    def image_encoder(self) -> PixelEmbedder:
        """The convolutions."""
        return self.network.backbone.embedder

    def describe_image_encoder(self) -> str:
        """See `Task`."""
        return f"{len(self.image_encoder.convolutions)} convolutions"

    scenes_protocol = "matching"
    metric_patterns = ("matching/pr_auc/*",)

    def describe_scorer(self) -> str:
        """Name the head and the metric."""
        return "pair head, average precision"
