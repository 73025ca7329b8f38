"""The answer list of VQA, and questions with their answers as a batch.

Legend: B questions, K distinct answers of one, T answer tokens, L question tokens.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mamo.data.cleaning import Clean
from mamo.data.collate import Batch, tokenize, tokenize_closed
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import RecordSample
from mamo.data.records import VqaRecord
from mamo.evaluation.metrics.vqa import soft_score
from mamo.evaluation.metrics.vqa_answers import distinct_answers, normalize_vqa_answer

ANSWERS = "answers.json"
"""Name of the answer list in a run's folder and in its checkpoints."""
ANSWER_MAX_TOKENS = 16
_VQA_ANSWERS = 10
"""Answers of each question of VQA v2."""
SINGLE_ANSWER_WEIGHT = 0.5
"""Of a question that one person answered (Visual Genome's), as ALBEF weighs it."""


def answer_list(records: Iterable[VqaRecord], min_count: int) -> list[str]:
    """Return answers that are the commonest one to at least `min_count` questions, the most frequent first.

    Questions of VQA v2 have a `multiple_choice_answer` or ten answers. Where there are some, questions that one person
    answered (Visual Genome's) put nothing on the list, as in METER.

    Raises ValueError where there is none.
    """
    records = list(records)
    if any(record.multiple_choice_answer or len(record.answers) == _VQA_ANSWERS for record in records):
        records = [record for record in records if record.multiple_choice_answer or len(record.answers) > 1]
    counts = Counter(answer for answer in map(_commonest, records) if answer)
    answers = [answer for answer, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    answers = [answer for answer in answers if counts[answer] >= min_count]
    if not answers:
        raise ValueError(f"vqa.answer_min_count: no answer is the commonest one to {min_count} training questions")
    return answers


def _commonest(record: VqaRecord) -> str:
    """Return the official answer of a question, or the commonest of its answers, normalised; "" if there is none."""
    return normalize_vqa_answer(record.multiple_choice_answer) or next(iter(distinct_answers(record)), "")


def log_odds(records: Sequence[VqaRecord], answers: Sequence[str]) -> Tensor:
    """Return the log-odds of each answer's mean score over the training questions, float32 [N].

    A classifier with these biases and no weights has the lowest binary cross-entropy that ignores the input.
    """
    row = {answer: k for k, answer in enumerate(answers)}
    total = torch.zeros(len(answers), dtype=torch.float64)
    for record in records:
        for answer, votes in distinct_answers(record).items():
            if answer in row:
                total[row[answer]] += soft_score(votes, len(record.answers))
    half = 0.5 / len(records)  # keeps an answer to all questions finite
    return (total / len(records)).clamp(half, 1 - half).logit().float()


def read_answers(folder: Path) -> list[str]:
    """Return the answer list of a run or a checkpoint. Raises ValueError where there is none."""
    try:
        answers = json.loads((folder / ANSWERS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / ANSWERS}: no answer list: {error}") from None
    return [str(answer) for answer in answers]


@dataclass(frozen=True, slots=True)
class VqaBatch(Batch):
    """Questions with their answers."""

    image: Tensor
    """uint8 [B, 3, H, W]."""
    input_ids: Tensor
    """int64 [B, L], the questions."""
    is_valid: Tensor
    """bool [B, L], False at padding."""
    answer_ids: Tensor
    """int64 [B, K, T], `[CLS] answer [SEP]` of each distinct answer; [PAD] where a question has fewer."""
    answer_is_valid: Tensor
    """bool [B, K, T], False at padding."""
    answer_weight: Tensor
    """float32 [B, K], the share of people who gave it; 0 at padding."""
    answer_row: Tensor
    """int64 [B, K], its place on the answer list, -1 where it is not on it."""
    answer_score: Tensor
    """float32 [B, K], what it is worth to the evaluation: min(1, 3 votes / people), of ten the official accuracy."""
    sample_id: Tensor
    """int64 [B], index in the data set."""
    skipped: tuple[str, ...] = ()
    """One line for each bad sample that was replaced."""


class VqaCollator:
    """Tokenizes questions and answers; runs in the loader's worker."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_max_tokens: int,
        answers: Sequence[str],
        seed: int,
        clean: Clean = clean_caption,
    ) -> None:
        self.tokenizer, self.clean = tokenizer, clean
        self.text_max_tokens = text_max_tokens
        self.row = {answer: row for row, answer in enumerate(answers)}
        self.seed = seed

    def __call__(self, drawn: Sequence[tuple[int, RecordSample[VqaRecord]]]) -> VqaBatch:
        """Collate (epoch, sample) pairs."""
        samples = [sample for _, sample in drawn]
        questions = [self.clean(sample.record.question) for sample in samples]
        input_ids, is_valid = tokenize(self.tokenizer, questions, self.text_max_tokens)
        found = [distinct_answers(sample.record) for sample in samples]
        places = [(row, at) for row, answers in enumerate(found) for at in range(len(answers))]
        width = max([1, *(len(answers) for answers in found)])
        texts = [answer for answers in found for answer in answers]
        ids, text_is_valid = tokenize_closed(self.tokenizer, texts or [""], ANSWER_MAX_TOKENS)
        shape = (len(samples), width, ids.shape[1])
        answer_ids = torch.full(shape, self.tokenizer.pad_token_id)
        answer_is_valid = torch.zeros(shape, dtype=torch.bool)
        weight, score = torch.zeros(shape[:2]), torch.zeros(shape[:2])
        list_row = torch.full(shape[:2], -1)
        for (row, at), text, own_ids, own_is_valid in zip(places, texts, ids, text_is_valid):
            people, votes = len(samples[row].record.answers), found[row][text]
            answer_ids[row, at], answer_is_valid[row, at] = own_ids, own_is_valid
            weight[row, at] = votes / people if people > 1 else SINGLE_ANSWER_WEIGHT
            list_row[row, at] = self.row.get(text, -1)
            score[row, at] = soft_score(votes, people)
        return VqaBatch(
            image=torch.stack([sample.images[0] for sample in samples]),
            input_ids=input_ids,
            is_valid=is_valid,
            answer_ids=answer_ids,
            answer_is_valid=answer_is_valid,
            answer_weight=weight,
            answer_row=list_row,
            answer_score=score,
            sample_id=torch.tensor([sample.sample_id for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )
