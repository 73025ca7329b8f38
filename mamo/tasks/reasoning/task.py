"""Fine-tuning on sentences about one image or a pair: is the sentence true?

Legend: B statements, I images of each.
"""

from pathlib import Path

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.data.cleaning import cleaner
from mamo.data.processor import cleaning_of
from mamo.data.record_dataset import RecordDataset
from mamo.data.records import ReasoningRecord
from mamo.evaluation.predictor import Predictor
from mamo.models.build import build_backbone, load_published
from mamo.tasks.base import Task
from mamo.tasks.reasoning.batch import ReasoningBatch, ReasoningCollator, same_number_of_images
from mamo.tasks.reasoning.config import ReasoningConfig
from mamo.tasks.reasoning.evaluate import evaluate_reasoning, read_subsets
from mamo.tasks.reasoning.head import ReasoningHead
from mamo.tasks.reasoning.network import ReasoningNetwork
from mamo.tasks.sources import check_records, load_records, record_dataset
from mamo.training.monitors import class_entropy


class ReasoningTask(Task[ReasoningBatch, None]):
    """True or false; the one loss is `truth`."""

    config_type = ReasoningConfig
    config: ReasoningConfig
    network: ReasoningNetwork
    n_images: int | None = None
    """Images of a training statement, once they are read."""

    def __init__(self, config: ReasoningConfig, tokenizer: PreTrainedTokenizerFast, stored: Path | None = None) -> None:
        super().__init__(config, tokenizer, stored)
        backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
        self.network = ReasoningNetwork(backbone, ReasoningHead(backbone.fusion, config.reasoning.cross_layers))
        load_published(config, self.network)
        self.weights = {"truth": 1.0}
        clean = cleaner(cleaning_of(config))
        self.collator = ReasoningCollator(tokenizer, config.data.text_max_tokens, config.seed, clean)

    def train_dataset(self) -> RecordDataset[ReasoningRecord]:
        """Open the training statements."""
        records, load_image = load_records(self.config.data, ReasoningRecord, "train", self.config.data.train_scenes)
        self.n_images = same_number_of_images(records, "data.train_file")
        return record_dataset(records, load_image, self.config.data)

    def init_new_parameters(self, folder: Path, new: tuple[str, ...]) -> None:
        """Start the head's layers from the last fusion layer."""
        if "pair.side" in new:
            self.network.pair.init_from(self.network.backbone.fusion)

    def losses(self, batch: ReasoningBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the two-class cross-entropy and the accuracy."""
        backbone, n_global = self.network.backbone, self.config.training.batch_size_global
        images = backbone.fusion.embed_image(backbone.image_encoder(batch.image.flatten(0, 1)))
        images = images.view(*batch.image.shape[:2], *images.shape[1:])  # [B, I, num_prefix_tokens + P, D]
        logits = self.network.reason(images, batch.input_ids, batch.is_valid, batch.is_ordered)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.label.float(), reduction="sum")
        num_correct = ((logits > 0) == batch.label).sum()
        return {"truth": loss / n_global}, {"truth_accuracy": num_correct / n_global}

    def trivial_losses(self, batch: ReasoningBatch) -> dict[str, float]:
        """Return the entropy of the labels."""
        return {"loss/truth": class_entropy(batch.label)}

    def check_evaluation_files(self) -> None:
        """Judge the evaluation statements, NLVR2's subsets and the headers of the images."""
        records = check_records(self.config.data, ReasoningRecord)
        if records and self.n_images not in (None, len(records[0].images)):
            raise ValueError(
                f"data.eval_file: its statements are about {len(records[0].images)} image(s), those of data.train_file "
                f"about {self.n_images}; train and evaluate on statements of one kind"
            )
        read_subsets(self.config.data, records)

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Judge the evaluation statements and write their logits."""
        return evaluate_reasoning(self.config, predictor, folder)

    scenes_protocol = "nlvr2"
    metric_patterns = (
        *("reasoning/accuracy", "reasoning/consistency", "reasoning/majority", "reasoning/interval_*"),
        "reasoning/*/*",
    )

    def describe_scorer(self) -> str:
        """Name the head."""
        return "pair head"
