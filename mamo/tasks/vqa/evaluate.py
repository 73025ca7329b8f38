"""Answers to questions: by ranking the answer list with a decoder, or from a classifier; and the submission file.

Legend: B questions, N answers of the list, K shortlisted, T answer tokens, S fused tokens, V vocabulary.
"""

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.data.collate import tokenize, tokenize_closed
from mamo.data.images import BadSamplePolicy
from mamo.data.record_dataset import LoadImage, file_records, image_names, load_unique_images, readable
from mamo.data.records import VqaRecord
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.vqa import VqaAnswers, soft_score, vqa_metrics
from mamo.evaluation.metrics.vqa_answers import distinct_answers
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics
from mamo.evaluation.scorer import eval_mode
from mamo.tasks.sources import bad_sample_policy, evaluation_records, require_some
from mamo.tasks.vqa.batch import ANSWER_MAX_TOKENS
from mamo.tasks.vqa.config import VqaConfig
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder, answer_likelihood
from mamo.tasks.vqa.network import VqaNetwork

logger = logging.getLogger(__name__)
SUBMISSION = "vqa_results.json"
_TOKENS_AT_ONCE = 2**16  # of shortlisted answers in one pass of the decoder


@dataclass(frozen=True, slots=True)
class AnswerList:
    """The possible answers: `ids` int64 [N, T] `[CLS] answer [SEP]`, `is_valid` bool [N, T]."""

    answers: Sequence[str]
    ids: Tensor
    is_valid: Tensor

    @classmethod
    def of(cls, answers: Sequence[str], tokenizer: PreTrainedTokenizerFast, device: torch.device) -> "AnswerList":
        """Tokenize the answers, on `device`."""
        ids, is_valid = tokenize_closed(tokenizer, answers, ANSWER_MAX_TOKENS)
        return cls(answers, ids.to(device), is_valid.to(device))


def rank_answers(
    decoder: AnswerDecoder, embed: Callable[[Tensor], Tensor], memory: Tensor, is_valid: Tensor, of: AnswerList, k: int
) -> Tensor:
    """Return the likeliest answer of the list for each question: the `k` with the likeliest first token, scored whole.

    With k = N this is the argmax of the likelihood over the whole list.

    Args:
        decoder: in eval mode.
        embed: token ids int64 [..., T] -> float [..., T, D_text].
        memory, is_valid: float [B, S, D] and bool [B, S], the fused tokens of image and question.
        of: the list.
        k: length of the shortlist; cut to N.

    Returns:
        int64 [B], rows of the list.
    """
    start = embed(of.ids[:1, :1])[None].expand(len(memory), -1, -1, -1)  # only [CLS], [B, 1, 1, D_text]
    first = decoder(start, memory, is_valid)[:, 0, 0].float().log_softmax(dim=-1)  # [B, V]
    shortlist = first[:, of.ids[:, 1]].topk(min(k, len(of.ids)), dim=1).indices  # [B, K]
    length = int(of.is_valid.sum(dim=1).max())
    step = max(1, _TOKENS_AT_ONCE // (shortlist.shape[1] * length))
    best = []
    for first_row in range(0, len(memory), step):
        rows = slice(first_row, first_row + step)
        ids, valid = of.ids[shortlist[rows]], of.is_valid[shortlist[rows]]  # [b, K, T]
        logits = decoder(embed(ids[..., :-1]), memory[rows], is_valid[rows])
        likeliest = answer_likelihood(logits, ids, valid).argmax(dim=1, keepdim=True)
        best.append(shortlist[rows].gather(1, likeliest)[:, 0])
    return torch.cat(best)


class Answerer:
    """A network in evaluation that answers questions about images from a list of answers."""

    def __init__(self, predictor: Predictor, answers: Sequence[str], k: int) -> None:
        self.network: VqaNetwork = predictor.network
        self.processor, self.device = predictor.processor, predictor.device
        self.list = AnswerList.of(answers, predictor.processor.tokenizer, predictor.device)
        self.k = k

    def __call__(self, image: Tensor, image_row: Tensor, questions: Sequence[str], is_blank: bool = False) -> list[str]:
        """Answer `questions` about image rows int64 [B] of `image` uint8 [I, 3, H, W].

        With `is_blank` every pixel has the mean colour: the answers then come from the question only.
        """
        network, backbone = self.network, self.network.backbone
        pixels = backbone.image_encoder.normalize(image.to(self.device))
        pixels = torch.zeros_like(pixels) if is_blank else pixels
        embedded = backbone.fusion.embed_image(backbone.image_encoder(pixels))[image_row.to(self.device)]
        texts = [self.processor.clean_question(text) for text in questions]
        ids, is_valid = tokenize(self.processor.tokenizer, texts, self.processor.text_max_tokens)
        self.processor.warn_of_cuts(texts, is_valid.sum(dim=1))
        question = (embedded, ids.to(self.device), is_valid.to(self.device))
        if isinstance(network.answer, AnswerClassifier):
            best = network.classify(*question).argmax(dim=1)
        else:
            memory = network.remember(*question)
            best = rank_answers(network.answer, backbone.text_encoder.embed, *memory, self.list, self.k)
        return [self.list.answers[row] for row in best.tolist()]


def answer_all(
    answerer: Answerer,
    records: Sequence[VqaRecord],
    load_image: LoadImage,
    image_size_px: tuple[int, int],
    batch_size: int,
    is_blank: bool = False,
    policy: BadSamplePolicy | None = None,
) -> dict[int, str]:
    """Return answers by question_id; ranks share the work.

    Without those whose images cannot be read, which `policy` counts (`load_unique_images`). Questions about one image
    stay together, so that it is read and encoded about once.
    """
    ordered = sorted(records, key=lambda record: record.image)

    def answer(start: int) -> dict[int, str]:
        part = ordered[start : start + batch_size]
        images, row = load_unique_images(part, load_image, image_size_px, policy, answerer.processor.resizing)
        part = readable(part, row)
        if not part:
            return {}
        rows = torch.tensor([row[record.image] for record in part])
        found = answerer(torch.stack(images), rows, [record.question for record in part], is_blank)
        return {record.question_id: answer for record, answer in zip(part, found, strict=True)}

    parts = range(0, len(ordered), batch_size)
    return {key: text for found in map_over_ranks(answer, parts) for key, text in found.items()}


def accuracies(predictions: Mapping[int, str], records: Sequence[VqaRecord]) -> dict[str, float]:
    """Return the official accuracy, whole and by answer type, of the questions with published answers, if any."""
    answered = {
        record.question_id: VqaAnswers(tuple(record.answers), record.answer_type, record.question_type)
        for record in records
        if record.answers
    }
    if not answered:
        return {}
    return vqa_metrics({key: predictions[key] for key in answered}, answered)


def majority_accuracy(records: Sequence[VqaRecord], answers: Sequence[str]) -> float:
    """Return the official accuracy in percent of the best single answer of the list to all questions.

    Raises ValueError where no question has a published answer.
    """
    votes: Counter[str] = Counter()
    for record in records:
        found = distinct_answers(record)
        votes.update({answer: soft_score(n, len(record.answers)) for answer, n in found.items()})
    best = max(answers, key=lambda answer: votes[answer])
    return accuracies({record.question_id: best for record in records}, records)["accuracy"]


def write_submission(
    file: Path, predictions: Mapping[int, str], records: Sequence[VqaRecord], answers: Sequence[str]
) -> None:
    """Write the official result file, `[{"question_id", "answer"}]`, complete or not at all.

    Raises ValueError, naming the file and the first record, where a question has no answer, an answer no question, or
    an answer is not on the list.
    """
    wanted, known = {record.question_id for record in records}, set(answers)
    for problem, keys in (
        ("questions have no answer", wanted - predictions.keys()),
        ("answers are to no question of the split", predictions.keys() - wanted),
        ("answers are not on the answer list", {key for key in predictions if predictions[key] not in known}),
    ):
        if keys:
            raise ValueError(f"{file}: {len(keys)} {problem}, the first is question_id {min(keys)}")
    rows = [{"question_id": key, "answer": predictions[key]} for key in sorted(predictions)]
    file.write_text(json.dumps(rows), "utf-8")


def refuse_overlap(
    train: Sequence[VqaRecord], evaluation: Sequence[VqaRecord], files: str, shared_images: bool = False
) -> float:
    """Return the percentage of evaluation questions whose image is trained on too; links and `..` are followed.

    Raises ValueError, naming the first, where a question is trained on too, or an image and `shared_images` is False.
    """
    path_of = functools.cache(os.path.realpath)  # of questions about one image
    seen_questions, seen_images = {record.question_id for record in train}, {path_of(record.image) for record in train}
    same_images = [record for record in evaluation if path_of(record.image) in seen_images]
    same = [record for record in same_images if record.question_id in seen_questions]
    allow = "; allow it with vqa.shared_images=true"
    for what, found, fix in (
        ("questions", same, ""),
        ("questions are about images that", [] if shared_images else same_images, allow),
    ):
        if found:
            name = f"question_id {found[0].question_id} ({image_names(found[0])[0]})"
            raise ValueError(f"{files}: {len(found)} {what} are in the training data too, the first is {name}{fix}")
    return 100.0 * len(same_images) / max(1, len(evaluation))


def refuse_training_questions(config: VqaConfig, train_files: list[str]) -> float:
    """Return the percentage of evaluation questions about images in training files; raises as `refuse_overlap`.

    A training file that is gone cannot be compared; the log says so. Scenes cannot overlap.
    """
    if config.data.source != "records" or config.data.eval_path is None:
        return 0.0
    found = [file for file in train_files if Path(file).is_file()]
    if len(found) < len(train_files):
        logger.warning("training files that are gone cannot be compared with %s", config.data.eval_path)
    if found:
        held_out, _ = file_records([config.data.eval_path], VqaRecord)
        train = file_records(found, VqaRecord)[0]
        return refuse_overlap(train, held_out, config.data.eval_path, config.vqa.shared_images)
    return 0.0


def evaluate_vqa(config: VqaConfig, answers: list[str], predictor: Predictor, folder: Path) -> Metrics:
    """Compute the official accuracy in percent, by answer type, with the image and (`question_only/`) without it.

    `vqa/majority` is that of the best single answer to all questions. Writes the submission file; where the split's
    answers are withheld, nothing is computed. Facts are the numbers of questions, of answers on the list and of
    questions that were skipped.
    """
    records, load_image = evaluation_records(config.data, VqaRecord, config.evaluation.probe_items)
    sizes = (config.data.image_size, config.evaluation.batch_size)
    with eval_mode(predictor.network):
        answerer = Answerer(predictor, answers, config.evaluation.rerank_k)
        found = answer_all(answerer, records, load_image, *sizes, policy=bad_sample_policy(config.data))
        require_some(found)
        kept = [record for record in records if record.question_id in found]
        write = functools.partial(write_submission, predictions=found, records=kept, answers=answers)
        map_over_ranks(write, [folder / SUBMISSION])  # by the first process only
        own = accuracies(found, kept)
        metrics: dict[str, float] = {}
        if own:
            baseline = {"vqa/accuracy": own["accuracy"], "vqa/majority": majority_accuracy(kept, answers)}
            metrics = baseline | {f"vqa/{name}": value for name, value in own.items()}
            blank = answer_all(answerer, kept, load_image, *sizes, is_blank=True)
            metrics |= {f"question_only/{name}": value for name, value in accuracies(blank, kept).items()}
    facts = {"questions": len(kept), "answers": len(answers), "skipped": len(records) - len(kept)}
    if config.vqa.head == "decoder":
        facts["rerank_k"] = config.evaluation.rerank_k
    return Metrics(metrics, facts)
