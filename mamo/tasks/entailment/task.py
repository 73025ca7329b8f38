"""Fine-tuning on visual entailment: one fusion of image and sentence a sample, then three-way cross-entropy.

Legend: B statements.
"""

from collections import Counter
from pathlib import Path

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mamo.data.cleaning import cleaner
from mamo.data.processor import cleaning_of
from mamo.data.record_dataset import RecordDataset
from mamo.data.records import EntailmentRecord
from mamo.evaluation.predictor import Predictor
from mamo.models.build import build_backbone, load_published
from mamo.tasks.base import Task
from mamo.tasks.entailment.batch import EntailmentBatch, EntailmentCollator
from mamo.tasks.entailment.config import EntailmentConfig
from mamo.tasks.entailment.evaluate import PREDICTIONS, confusion_table, evaluate_entailment, refuse_training_images
from mamo.tasks.entailment.network import EntailmentNetwork
from mamo.tasks.sources import check_records, load_records, record_dataset
from mamo.training.monitors import unigram_entropy


class EntailmentTask(Task[EntailmentBatch, None]):
    """Entailment, neutral or contradiction; the one loss is `entailment`."""

    config_type = EntailmentConfig
    config: EntailmentConfig
    network: EntailmentNetwork

    def __init__(
        self, config: EntailmentConfig, tokenizer: PreTrainedTokenizerFast, stored: Path | None = None
    ) -> None:
        super().__init__(config, tokenizer, stored)
        self.network = EntailmentNetwork(build_backbone(config, len(tokenizer), tokenizer.pad_token_id))
        load_published(config, self.network)
        self.weights = {"entailment": 1.0}
        clean = cleaner(cleaning_of(config))
        self.collator = EntailmentCollator(tokenizer, config.data.text_max_tokens, config.seed, clean)

    def train_dataset(self) -> RecordDataset[EntailmentRecord]:
        """Open the training sentences; refuse an evaluation on training images."""
        data = self.config.data
        if self.config.evaluation.enabled:
            self.check_held_out(data.train_files)
        return record_dataset(*load_records(data, EntailmentRecord, "train", data.train_scenes), data)

    def losses(self, batch: EntailmentBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the three-way cross-entropy and the accuracy."""
        n_global = self.config.training.batch_size_global
        image = self.network.embed(batch.image, self.config.entailment.text_only)
        logits = self.network.classify(image, batch.input_ids, batch.is_valid)
        loss = functional.cross_entropy(logits, batch.label, reduction="sum")
        num_correct = (logits.argmax(dim=1) == batch.label).sum()
        return {"entailment": loss / n_global}, {"entailment_accuracy": num_correct / n_global}

    def trivial_losses(self, batch: EntailmentBatch) -> dict[str, float]:
        """Return the entropy of the labels."""
        return {"loss/entailment": unigram_entropy(Counter(batch.label.tolist()))}

    def check_evaluation_files(self) -> None:
        """Judge the evaluation sentences and the headers of their images."""
        check_records(self.config.data, EntailmentRecord)

    def check_held_out(self, train_files: list[str]) -> None:
        """Refuse images that the network was trained on."""
        refuse_training_images(self.config, train_files)

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Classify the evaluation sentences, with the pictures and with blank ones, and write the predictions."""
        return evaluate_entailment(self.config, predictor, folder)

    def report(self, predictor: Predictor, rows: int, folder: Path) -> list[tuple[str, str]]:
        """Show predicted labels against true ones, from the file that `evaluate` wrote."""
        return [("Entailment: true labels in rows, predicted ones in columns", confusion_table(folder / PREDICTIONS))]

    scenes_protocol = "entailment"
    metric_patterns = (
        *("entailment/accuracy", "entailment/majority", "entailment/interval_*", "text_only/accuracy"),
        *("entailment/entailment", "entailment/neutral", "entailment/contradiction"),
    )

    def describe_scorer(self) -> str:
        """Name the head, and the control without pictures."""
        return "three-way classifier of the fused [CLS]" + (
            ", blank pictures" if self.config.entailment.text_only else ""
        )
