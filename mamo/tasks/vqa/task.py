"""Fine-tuning on questions: one fusion of image and question a sample, then the decoder's or the classifier's loss.

Legend: B questions, K distinct answers of one, T answer tokens, D width.
"""

import functools
import json
import logging
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.data.cleaning import cleaner
from mamo.data.processor import cleaning_of
from mamo.data.record_dataset import LoadImage, RecordDataset
from mamo.data.records import VqaRecord
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics, facts_of
from mamo.models.build import build_backbone, load_published
from mamo.tasks.base import Task
from mamo.tasks.sources import check_records, load_records, record_dataset
from mamo.tasks.vqa.batch import ANSWERS, VqaBatch, VqaCollator, answer_list, log_odds, read_answers
from mamo.tasks.vqa.config import VqaConfig
from mamo.tasks.vqa.evaluate import SUBMISSION, evaluate_vqa, refuse_training_questions
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder, answer_likelihood
from mamo.tasks.vqa.losses import classifier_loss, decoder_loss, list_scores
from mamo.tasks.vqa.network import VqaNetwork
from mamo.tasks.vqa.report import answer_confusion
from mamo.training import checkpoint

logger = logging.getLogger(__name__)


class VqaTask(Task[VqaBatch, None]):
    """Answers to questions about images; the one loss is `answer`."""

    shared_images_percent = 0.0
    """Percentage of evaluation questions about training images, see `check_held_out`."""

    config_type = VqaConfig
    config: VqaConfig
    network: VqaNetwork

    def __init__(self, config: VqaConfig, tokenizer: PreTrainedTokenizerFast, stored: Path | None = None) -> None:
        super().__init__(config, tokenizer, stored)
        if stored is None:
            self.answers = answer_list(self.training_records[0], config.vqa.answer_min_count)
            logger.info("answer list: %d answers", len(self.answers))
        else:
            self.answers = read_answers(stored)
        backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
        if config.vqa.head == "classifier":
            classifier = AnswerClassifier(backbone.fusion.width, len(self.answers))
            if stored is None:
                classifier.start_from(log_odds(self.training_records[0], self.answers))
            self.network = VqaNetwork(backbone, classifier)
        else:
            self.network = VqaNetwork(backbone, AnswerDecoder(backbone.fusion, backbone.text_encoder))
        load_published(config, self.network)
        self.weights = {"answer": 1.0}
        self.assets = {ANSWERS: json.dumps(self.answers, indent=1) + "\n"}
        clean = cleaner(cleaning_of(config), is_question=True)
        self.collator = VqaCollator(tokenizer, config.data.text_max_tokens, self.answers, config.seed, clean)

    @functools.cached_property
    def training_records(self) -> tuple[list[VqaRecord], LoadImage]:
        """The training questions, and what reads their images."""
        return load_records(self.config.data, VqaRecord, "train", self.config.data.train_scenes)

    def train_dataset(self) -> RecordDataset[VqaRecord]:
        """Open the training questions; refuse those that the evaluation asks too."""
        if self.config.evaluation.enabled:
            self.check_held_out(self.config.data.train_files)
        return record_dataset(*self.training_records, self.config.data)

    def init_new_parameters(self, folder: Path, new: tuple[str, ...]) -> None:
        """Start a new decoder from the fusion layers and, where the checkpoint has it, from the masked-word head."""
        head = self.network.answer
        if not isinstance(head, AnswerDecoder) or "answer.layers.0.qkv.weight" not in new:
            return
        head.init_from(self.network.backbone.fusion)
        stored = checkpoint.read_tensors(folder, "student")
        words = {name.removeprefix("mlm."): value for name, value in stored.items() if name.startswith("mlm.")}
        if words:
            head.words.load_state_dict({**head.words.state_dict(), **words})
        logger.info("answer decoder: from the fusion layers%s", " and the masked-word head" if words else "")

    def losses(self, batch: VqaBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss and an accuracy."""
        network, head, n_global = self.network, self.network.answer, self.config.training.batch_size_global
        image = network.backbone.fusion.embed_image(network.backbone.image_encoder(batch.image))
        question = (image, batch.input_ids, batch.is_valid)
        if isinstance(head, AnswerClassifier):
            logits = network.classify(*question)
            score = list_scores(batch.answer_row, batch.answer_score, logits.shape[1])
            right = score.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
            return {"answer": classifier_loss(logits, score, n_global)}, {"answer_accuracy": right / n_global}
        memory, memory_is_valid = network.remember(*question)
        embedded = network.backbone.text_encoder.embed(batch.answer_ids[..., :-1])
        logits = head(embedded, memory, memory_is_valid)
        likelihood = answer_likelihood(logits, batch.answer_ids, batch.answer_is_valid)
        is_right = logits[:, :, 0].argmax(dim=-1) == batch.answer_ids[:, :, 1]  # the first token of each answer
        right = (is_right * batch.answer_weight).sum()
        loss = decoder_loss(likelihood, batch.answer_weight, n_global)
        return {"answer": loss}, {"first_token_accuracy": right / n_global}

    def check_evaluation_files(self) -> None:
        """Judge the evaluation questions and the headers of their images."""
        check_records(self.config.data, VqaRecord)

    def check_held_out(self, train_files: list[str]) -> None:
        """Refuse questions and images that the network was trained on."""
        self.shared_images_percent = refuse_training_questions(self.config, train_files)

    def evaluate(self, predictor: Predictor, folder: Path) -> dict[str, float]:
        """Answer the evaluation questions, with the image and without it.

        The fact `shared_images` is the percentage of questions about training images, where the config allows them.
        """
        metrics = evaluate_vqa(self.config, self.answers, predictor, folder)
        shared = {"shared_images": self.shared_images_percent} if self.config.vqa.shared_images else {}
        return Metrics(metrics, facts_of(metrics) | shared)

    def report(self, predictor: Predictor, rows: int, folder: Path) -> list[tuple[str, str]]:
        """Show the answers of the submission file, which `evaluate` wrote, against the gold ones."""
        records, _ = load_records(self.config.data, VqaRecord, "test", self.config.evaluation.probe_items)
        submitted = json.loads((folder / SUBMISSION).read_text("utf-8"))
        answered = {row["question_id"]: row["answer"] for row in submitted}
        return answer_confusion(answered, [record for record in records if record.question_id in answered], rows)

    scenes_protocol = "vqa"
    metric_patterns = (
        *("vqa/accuracy", "vqa/accuracy/*", "vqa/majority"),
        *("question_only/accuracy", "question_only/accuracy/*"),
    )

    def describe_scorer(self) -> str:
        """Name the head and its shortlist."""
        k = self.config.evaluation.rerank_k
        ranked = f"answer decoder, first-token shortlist of {k}, then full likelihood"
        return ranked if self.config.vqa.head == "decoder" else "answer classifier"
