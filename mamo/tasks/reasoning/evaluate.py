"""A network's judgement of sentences about images, and the numbers that follow (NLVR, NLVR2)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamo.data.collate import tokenize
from mamo.data.pairs_reader import clean_caption
from mamo.data.record_dataset import LoadImage, load_unique_images
from mamo.data.records import ReasoningRecord
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.reasoning import reasoning_metrics
from mamo.evaluation.metrics.statements import StatementRecord, interval_by_sentence, write_scores
from mamo.models.vlm import Mamo
from mamo.tasks.reasoning.batch import is_ordered


def predict_reasoning(
    network: Mamo,
    tokenizer: Any,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    text_max_tokens: int,
    records: Sequence[ReasoningRecord],
    load_image: LoadImage,
    image_size_px: tuple[int, int],
    batch_size: int,
) -> dict[str, float]:
    """Logits that the statements are true, by identifier; statements about the same images stay together, so that each
    is read and encoded about once. Several processes share the work.
    """
    backbone, ordered = network.backbone, sorted(records, key=lambda record: record.images)

    def judge(start: int) -> dict[str, float]:
        part = ordered[start : start + batch_size]
        images, row = load_unique_images(part, load_image, image_size_px)
        slots = backbone.fusion.embed_image(backbone.image_encoder(normalise(torch.stack(images).to(device))))
        rows = torch.tensor([[row[name] for name in record.images] for record in part], device=device)
        sentences = [record.sentence for record in part]
        ids, is_valid = tokenize(tokenizer, [clean_caption(text) for text in sentences], text_max_tokens)
        sided = torch.tensor([is_ordered(text) for text in sentences], device=device)
        found = network.judge(slots[rows], ids.to(device), is_valid.to(device), sided).tolist()
        return {record.identifier: logit for record, logit in zip(part, found, strict=True)}

    parts = range(0, len(ordered), batch_size)
    return {name: logit for found in map_over_ranks(judge, parts) for name, logit in found.items()}


def judgement_metrics(
    logits: Mapping[str, float], records: Sequence[ReasoningRecord], subsets: Mapping[str, set[str]]
) -> dict[str, float]:
    """`accuracy`, `consistency`, `majority`, a 95 % interval of the accuracy clustered by sentence
    (`interval_low`, `interval_high`), and `SUBSET/...` of identifiers where the split has subsets; in percent.

    Raises ValueError where a subset names a statement that the split does not have.
    """
    labels = {record.identifier: record.label for record in records}
    predictions = {identifier: logit > 0 for identifier, logit in logits.items()}
    metrics = reasoning_metrics(predictions, labels)
    is_right = np.array([predictions[record.identifier] == record.label for record in records])
    metrics |= interval_by_sentence(is_right, [record.sentence for record in records])
    for name, members in subsets.items():
        unknown = members - labels.keys()
        if unknown:
            raise ValueError(f"NLVR2: {len(unknown)} {name} statements are not of the split, the first {min(unknown)}")
        chosen = [{key: values[key] for key in members} for values in (predictions, labels)]
        metrics |= {f"{name}/{key}": value for key, value in reasoning_metrics(*chosen).items()}
    return metrics


def write_logits(file: Path, logits: Mapping[str, float], records: Sequence[ReasoningRecord]) -> None:
    """Write the logits as scores of statements, by which `pool.py` joins several runs; the directory is the images'."""
    statements = [
        StatementRecord(record.images[0], record.sentence, record.label, Path(record.images[0]).parent.name)
        for record in records
    ]
    write_scores(file, np.array([logits[record.identifier] for record in records]), statements)
