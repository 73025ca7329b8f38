"""A network's judgement of sentences about images, and the numbers that follow (NLVR, NLVR2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mamo.config.schema import DataConfig
from mamo.data.collate import tokenize
from mamo.data.images import BadSamplePolicy
from mamo.data.record_dataset import LoadImage, load_unique_images, readable
from mamo.data.records import ReasoningRecord, read_task_records
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.reasoning import reasoning_metrics
from mamo.evaluation.metrics.statements import StatementRecord, interval_by_sentence, write_scores
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics
from mamo.evaluation.scorer import eval_mode
from mamo.tasks.reasoning.batch import is_ordered
from mamo.tasks.reasoning.config import ReasoningConfig
from mamo.tasks.sources import bad_sample_policy, evaluation_records, require_some
from mamo.training.run_dir import STATEMENT_SCORES

SUBSETS = ("balanced", "unbalanced")


def predict_reasoning(
    predictor: Predictor,
    records: Sequence[ReasoningRecord],
    load_image: LoadImage,
    batch_size: int,
    policy: BadSamplePolicy | None = None,
) -> dict[str, float]:
    """Return logits that the statements are true, by identifier; ranks share the work.

    Without those whose images cannot be read, which `policy` counts (`load_unique_images`). Statements about the same
    images stay together, so that each image is read and encoded about once.
    """
    network, processor, device = predictor.network, predictor.processor, predictor.device
    backbone, ordered = network.backbone, sorted(records, key=lambda record: record.images)

    def judge(start: int) -> dict[str, float]:
        part = ordered[start : start + batch_size]
        images, row = load_unique_images(part, load_image, processor.image_size_px, policy, processor.resizing)
        part = readable(part, row)
        if not part:
            return {}
        slots = backbone.fusion.embed_image(backbone.image_encoder(torch.stack(images).to(device)))
        rows = torch.tensor([[row[name] for name in record.images] for record in part], device=device)
        sentences = [record.sentence for record in part]
        cleaned = list(map(processor.clean, sentences))
        ids, is_valid = tokenize(processor.tokenizer, cleaned, processor.text_max_tokens)
        processor.warn_of_cuts(cleaned, is_valid.sum(dim=1))
        sided = torch.tensor([is_ordered(text) for text in sentences], device=device)
        found = network.reason(slots[rows], ids.to(device), is_valid.to(device), sided).tolist()
        return {record.identifier: logit for record, logit in zip(part, found, strict=True)}

    parts = range(0, len(ordered), batch_size)
    return {name: logit for found in map_over_ranks(judge, parts) for name, logit in found.items()}


def judgement_metrics(
    logits: Mapping[str, float], records: Sequence[ReasoningRecord], subsets: Mapping[str, set[str]]
) -> dict[str, float]:
    """Compute the metrics of the predictions, in percent.

    They are `accuracy`, `consistency`, `majority`, a 95 % interval of the accuracy clustered by sentence
    (`interval_low`, `interval_high`), and `SUBSET/...` of identifiers where the split has subsets.

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


def read_subsets(data: DataConfig, records: Sequence[ReasoningRecord]) -> dict[str, set[str]]:
    """Return the identifiers of NLVR2's subsets: of the files `balanced-NAME` and `unbalanced-NAME` next to the split.

    Raises:
        ValueError: a file cannot be read, or names a statement that the split does not have.
    """
    subsets: dict[str, set[str]] = {}
    whole = Path(data.eval_path or ".")
    known = {record.identifier for record in records}
    for name in SUBSETS:
        file = whole.parent / f"{name}-{whole.name}"
        if data.eval_path is not None and file.is_file():
            subsets[name] = {record.identifier for record in read_task_records(file, ReasoningRecord)}
            if unknown := subsets[name] - known:
                raise ValueError(f"{file}: {len(unknown)} statements are not of {whole}, the first {min(unknown)}")
    return subsets


def evaluate_reasoning(config: ReasoningConfig, predictor: Predictor, folder: Path) -> Metrics:
    """Compute `reasoning/` accuracy, consistency, majority and interval in percent; write the logits.

    Subsets are those of `read_subsets`. Facts are the numbers of statements and of those that were skipped.
    """
    data = config.data
    records, load_image = evaluation_records(data, ReasoningRecord, config.evaluation.probe_items)
    subsets = read_subsets(data, records)
    with eval_mode(predictor.network):
        logits = predict_reasoning(
            predictor, records, load_image, config.evaluation.batch_size, bad_sample_policy(data)
        )
    require_some(logits)
    kept = [record for record in records if record.identifier in logits]
    subsets = {name: members & logits.keys() for name, members in subsets.items()}
    map_over_ranks(lambda file: write_logits(file, logits, kept), [folder / STATEMENT_SCORES])  # on rank 0
    metrics = judgement_metrics(logits, kept, {name: members for name, members in subsets.items() if members})
    facts = {"statements": len(kept), "skipped": len(records) - len(kept)}
    return Metrics({f"reasoning/{name}": value for name, value in metrics.items()}, facts)
