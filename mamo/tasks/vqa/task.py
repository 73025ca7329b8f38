"""Fine-tuning on questions: one fusion of image and question a sample, then the decoder's or the classifier's loss.

Legend: B questions, K distinct answers of one, T answer tokens, D width.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamo.config.schema import RunConfig
from mamo.data.record_dataset import LoadImage, RecordDataset, file_records
from mamo.data.records import VqaRecord
from mamo.distributed import map_over_ranks
from mamo.evaluation.scorer import eval_mode
from mamo.models.build import build_backbone, load_published
from mamo.models.fusion import Fusion
from mamo.models.vlm import Mamo
from mamo.tasks.base import Parts, PixelNorm, Trained
from mamo.tasks.sources import check_records, load_records, record_dataset
from mamo.tasks.vqa.batch import ANSWERS, VqaBatch, VqaCollator, answer_list, read_answers
from mamo.tasks.vqa.config import VqaConfig
from mamo.tasks.vqa.evaluate import Answerer, accuracies, answer_all, refuse_overlap, write_submission
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder, answer_likelihood
from mamo.tasks.vqa.losses import classifier_loss, decoder_loss, list_scores
from mamo.tasks.vqa.report import answer_confusion
from mamo.training import checkpoint

logger = logging.getLogger(__name__)
SUBMISSION = "vqa_results.json"


class VqaTask:
    """Answers given image and question; `losses` has the one loss, `answer`."""

    def __init__(self, config: VqaConfig, network: Mamo, normalise: PixelNorm) -> None:
        self.network = network
        self.normalise = normalise
        self.weights = {"answer": 1.0}
        self.n_global = config.training.batch_size_global

    def modules(self) -> dict[str, nn.Module]:
        """The network alone."""
        return {"student": self.network}

    def prepare(self, batch: VqaBatch, micro_batch_size: int, step: int) -> tuple[None, dict[str, Tensor]]:
        """Nothing to prepare."""
        return None, {}

    def losses(self, batch: VqaBatch, targets: None, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and an accuracy of one micro-batch, as shares of the global batch."""
        backbone, fusion, head = self.network.backbone, self.network.backbone.fusion, self.network.answer
        image = fusion.embed_image(backbone.image_encoder(self.normalise(batch.image)))
        text = backbone.text_encoder(batch.input_ids, batch.is_valid)
        if isinstance(head, AnswerClassifier):
            read = fusion.text_positions(torch.zeros(len(batch), 1, dtype=torch.int64, device=text.device))  # [CLS]
            logits = head(fusion(image, text, batch.is_valid, read)[:, 0])
            score = list_scores(batch.answer_row, batch.answer_score, logits.shape[1])
            right = score.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
            loss = classifier_loss(logits, score, self.n_global)
            return {"answer": loss}, {"answer_accuracy": right / self.n_global}
        assert head is not None
        assert isinstance(fusion, Fusion)  # the config refuses the other
        memory = fusion(image, text, batch.is_valid)
        embedded = backbone.text_encoder.embed(batch.answer_ids[..., :-1])
        logits = head(embedded, memory, fusion.is_valid(batch.is_valid))
        likelihood = answer_likelihood(logits, batch.answer_ids, batch.answer_is_valid)
        hits = logits[:, :, 0].argmax(dim=-1) == batch.answer_ids[:, :, 1]  # the first token of each answer
        right = (hits * batch.answer_weight).sum()
        return {"answer": decoder_loss(likelihood, batch.answer_weight, self.n_global)}, {
            "first_token_accuracy": right / self.n_global
        }

    def after_step(self, batch: VqaBatch, targets: None, step: int) -> None:
        """No further state."""


def vqa_parts(config: VqaConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """Questions in, official accuracy and a submission file out; the answer list is made of the training answers."""
    train: list[tuple[list[VqaRecord], LoadImage]] = []  # read once, when first needed

    def training() -> tuple[list[VqaRecord], LoadImage]:
        if not train:
            train.append(load_records(config.data, VqaRecord, "train", config.data.train_scenes))
        return train[0]

    if stored is None:
        answers = answer_list(training()[0], config.vqa.answer_min_count)
        logger.info("answer list: %d answers", len(answers))
    else:
        answers = read_answers(stored)
    backbone = build_backbone(config, len(tokenizer), tokenizer.pad_token_id)
    if config.vqa.head == "classifier":
        network = Mamo(backbone, answer=AnswerClassifier(backbone.fusion.width, len(answers)))
    else:
        assert isinstance(backbone.fusion, Fusion)  # the config refuses the other
        network = Mamo(backbone, answer=AnswerDecoder(backbone.fusion, backbone.text_encoder))
    load_published(config, network)

    def source() -> RecordDataset[VqaRecord]:
        if config.evaluation.enabled:
            refuse_training_questions(config, config.data.train_files)
        return record_dataset(*training(), config.data)

    return Parts(
        network=network,
        image_encoder=backbone.image_encoder,
        source=source,
        collator=VqaCollator(tokenizer, config.data.text_max_tokens, answers, config.seed),
        task=functools.partial(VqaTask, config, network),
        evaluate=functools.partial(evaluate_vqa, config, answers),
        baselines=lambda batch: {},
        begin=functools.partial(_begin, network),
        pictures=functools.partial(_answers_shown, config),
        carried={ANSWERS: json.dumps(answers, indent=1) + "\n"},
        check=functools.partial(check_records, config.data, VqaRecord),
    )


def refuse_training_questions(config: RunConfig, train_files: list[str]) -> None:
    """Raise ValueError where `data.eval_file` shares a question or an image with training files.

    A file that is not there any more cannot be compared, and the log says so. Scenes cannot overlap.
    """
    if config.data.source != "records" or config.data.eval_file is None:
        return
    there = [file for file in train_files if Path(file).is_file()]
    if len(there) < len(train_files):
        logger.warning("training files that are gone cannot be compared with %s", config.data.eval_file)
    if there:
        held_out, _ = file_records([config.data.eval_file], VqaRecord)
        refuse_overlap(file_records(there, VqaRecord)[0], held_out, config.data.eval_file)


def _begin(network: Mamo, folder: Path, new: tuple[str, ...]) -> None:
    """Start a new decoder from the fusion layers and, where the checkpoint has it, from the masked-word head."""
    head = network.answer
    if not isinstance(head, AnswerDecoder) or "answer.layers.0.qkv.weight" not in new:
        return
    assert isinstance(network.backbone.fusion, Fusion)
    head.init_from(network.backbone.fusion)
    stored = checkpoint.read_tensors(folder, "student")
    words = {name.removeprefix("mlm."): value for name, value in stored.items() if name.startswith("mlm.")}
    if words:
        head.words.load_state_dict({**head.words.state_dict(), **words})
    logger.info("answer decoder: from the fusion layers%s", " and the masked-word head" if words else "")


def evaluate_vqa(config: VqaConfig, answers: list[str], trained: Trained, folder: Path) -> dict[str, float]:
    """Official accuracy in percent, by answer type, with the image and (`question_only/`) without it.

    Writes the submission file; where the split's answers are withheld it is all there is.
    """
    records, load_image = load_records(config.data, VqaRecord, "test", config.evaluation.probe_items)
    settings = (trained.normalise, trained.device, answers, config.data.text_max_tokens, config.evaluation.rerank_k)
    metrics: dict[str, float] = {}
    with eval_mode(trained.network):
        answerer = Answerer(trained.network, trained.tokenizer, *settings)
        for prefix, is_blank in (("vqa", False), ("question_only", True)):
            if is_blank and not metrics:
                break  # no published answers: nothing to compare
            sizes = (config.data.image_size, config.evaluation.batch_size)
            given = answer_all(answerer, records, load_image, *sizes, is_blank)
            metrics |= {f"{prefix}/{name}": value for name, value in accuracies(given, records).items()}
            if not is_blank:
                write = functools.partial(write_submission, predictions=given, records=records, answers=answers)
                map_over_ranks(write, [folder / SUBMISSION])  # by the first process alone
    return metrics


def _answers_shown(config: VqaConfig, trained: Trained, rows: int, folder: Path) -> list[tuple[str, str]]:
    """The answers of the submission file, which `evaluate_vqa` has written, against the gold ones."""
    records, _ = load_records(config.data, VqaRecord, "test", config.evaluation.probe_items)
    given = {row["question_id"]: row["answer"] for row in json.loads((folder / SUBMISSION).read_text("utf-8"))}
    return answer_confusion(given, records, rows)
