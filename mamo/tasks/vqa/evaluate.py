"""Answers to questions: by ranking the answer list with a decoder, or from a classifier; and the submission file.

Legend: B questions, N answers of the list, K shortlisted, T answer tokens, S fused tokens, V vocabulary.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamo.data.collate import tokenize
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import LoadImage, image_names, load_unique_images
from mamo.data.records import VqaRecord
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.vqa import VqaAnswers, vqa_metrics
from mamo.models.fusion import Fusion
from mamo.models.vlm import Mamo
from mamo.tasks.vqa.batch import ANSWER_MAX_TOKENS
from mamo.tasks.vqa.heads import AnswerClassifier, AnswerDecoder, answer_likelihood

_TOKENS_AT_ONCE = 2**16  # of shortlisted answers in one pass of the decoder


@dataclass(frozen=True, slots=True)
class AnswerList:
    """The answers that may be given: `ids` int64 [N, T] `[CLS] answer [SEP]`, `is_valid` bool [N, T]."""

    answers: Sequence[str]
    ids: Tensor
    is_valid: Tensor

    @classmethod
    def of(cls, answers: Sequence[str], tokenizer: Any, device: torch.device) -> "AnswerList":
        """The list in tokens, on `device`."""
        ids, is_valid = tokenize(tokenizer, answers, ANSWER_MAX_TOKENS)
        return cls(answers, ids.to(device), is_valid.to(device))


def rank_answers(
    decoder: AnswerDecoder, embed: Callable[[Tensor], Tensor], memory: Tensor, is_valid: Tensor, of: AnswerList, k: int
) -> Tensor:
    """The likeliest answer of the list for each question: the `k` with the likeliest first token, scored whole.

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
    start = embed(of.ids[:1, :1])[None].expand(len(memory), -1, -1, -1)  # [CLS] alone, [B, 1, 1, D_text]
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
    """A network in evaluation that answers questions about images."""

    def __init__(
        self,
        network: Mamo,
        tokenizer: Any,
        normalise: Callable[[Tensor], Tensor],
        device: torch.device,
        answers: Sequence[str],
        text_max_tokens: int,
        k: int,
    ) -> None:
        self.network, self.tokenizer, self.normalise, self.device = network, tokenizer, normalise, device
        self.list = AnswerList.of(answers, tokenizer, device)
        self.text_max_tokens, self.k = text_max_tokens, k

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [..., T] -> the text encoder's embedding, float [..., T, D_text]."""
        embedded: Tensor = self.network.backbone.text_encoder.embed(ids)
        return embedded

    def __call__(self, image: Tensor, image_row: Tensor, questions: Sequence[str], is_blank: bool = False) -> list[str]:
        """Answers to `questions` about image rows int64 [B] of `image` uint8 [I, 3, H, W].

        With `is_blank` every pixel has the mean colour: what the question alone gives away.
        """
        backbone = self.network.backbone
        pixels = self.normalise(image.to(self.device))
        pixels = torch.zeros_like(pixels) if is_blank else pixels
        slots = backbone.fusion.embed_image(backbone.image_encoder(pixels))
        ids, is_valid = tokenize(self.tokenizer, [clean_caption(text) for text in questions], self.text_max_tokens)
        ids, is_valid = ids.to(self.device), is_valid.to(self.device)
        text = backbone.text_encoder(ids, is_valid)
        fusion, head = backbone.fusion, self.network.answer
        joined = slots[image_row.to(self.device)]
        if isinstance(head, AnswerClassifier):
            read = fusion.text_positions(torch.zeros(len(text), 1, dtype=torch.int64, device=self.device))  # [CLS]
            best = head(fusion(joined, text, is_valid, read)[:, 0]).argmax(dim=1)
        else:
            assert head is not None
            assert isinstance(fusion, Fusion)  # the config refuses the other
            memory = fusion(joined, text, is_valid)
            best = rank_answers(head, self.embed, memory, fusion.is_valid(is_valid), self.list, self.k)
        return [self.list.answers[row] for row in best.tolist()]


def answer_all(
    answerer: Answerer,
    records: Sequence[VqaRecord],
    load_image: LoadImage,
    image_size_px: tuple[int, int],
    batch_size: int,
    is_blank: bool = False,
) -> dict[int, str]:
    """Answers by question_id; questions about one image stay together, so that it is read and encoded about once.

    Several processes share the work.
    """
    ordered = sorted(records, key=lambda record: record.image)

    def answer(start: int) -> dict[int, str]:
        part = ordered[start : start + batch_size]
        images, row = load_unique_images(part, load_image, image_size_px)
        rows = torch.tensor([row[record.image] for record in part])
        given = answerer(torch.stack(images), rows, [record.question for record in part], is_blank)
        return {record.question_id: answer for record, answer in zip(part, given, strict=True)}

    parts = range(0, len(ordered), batch_size)
    return {key: text for given in map_over_ranks(answer, parts) for key, text in given.items()}


def accuracies(predictions: Mapping[int, str], records: Sequence[VqaRecord]) -> dict[str, float]:
    """The official accuracy, whole and by answer type, of the questions that have published answers; else nothing."""
    answered = {
        record.question_id: VqaAnswers(tuple(record.answers), record.answer_type, record.question_type)
        for record in records
        if record.answers
    }
    if not answered:
        return {}
    return vqa_metrics({key: predictions[key] for key in answered}, answered)


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


def refuse_overlap(train: Sequence[VqaRecord], evaluation: Sequence[VqaRecord], files: str) -> None:
    """Raise ValueError, naming the first, where a question or an image of the evaluation is trained on too."""
    seen_questions, seen_images = {record.question_id for record in train}, {record.image for record in train}
    same_images = [record for record in evaluation if record.image in seen_images]
    same = [record for record in same_images if record.question_id in seen_questions]
    for what, found in (("questions", same), ("questions are about images that", same_images)):
        if found:
            name = f"question_id {found[0].question_id} ({image_names(found[0])[0]})"
            raise ValueError(f"{files}: {len(found)} {what} are in the training data too, the first is {name}")
