"""Labels of sentences about images, and the numbers that follow (SNLI-VE)."""

import functools
import html
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mamo.data.collate import tokenize
from mamo.data.files import parse_json
from mamo.data.images import BadSamplePolicy
from mamo.data.pairs_reader import read_lines, write_json_lines
from mamo.data.record_dataset import LoadImage, file_records, image_names, load_unique_images, readable
from mamo.data.records import ENTAILMENT_LABELS, EntailmentRecord
from mamo.distributed import map_over_ranks
from mamo.evaluation.metrics.entailment import entailment_metrics
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics
from mamo.evaluation.scorer import eval_mode
from mamo.tasks.entailment.config import EntailmentConfig
from mamo.tasks.sources import bad_sample_policy, evaluation_records, require_some

logger = logging.getLogger(__name__)
PREDICTIONS = "entailment_predictions.jsonl"
Probabilities = dict[str, tuple[float, ...]]
"""Probability of each of `ENTAILMENT_LABELS`, by pair_id."""


def predict_entailment(
    predictor: Predictor,
    records: Sequence[EntailmentRecord],
    load_image: LoadImage,
    batch_size: int,
    policy: BadSamplePolicy | None = None,
    is_blank: bool = False,
) -> Probabilities:
    """Return the probabilities of the labels; ranks share the work.

    Without the records whose images cannot be read, which `policy` counts (`load_unique_images`). Records of one image
    stay together, so that it is read and encoded about once. With `is_blank` every pixel has the mean colour.
    """
    network, processor, device = predictor.network, predictor.processor, predictor.device
    ordered = sorted(records, key=lambda record: record.image)

    def classify(start: int) -> Probabilities:
        part = ordered[start : start + batch_size]
        images, row = load_unique_images(part, load_image, processor.image_size_px, policy, processor.resizing)
        part = readable(part, row)
        if not part:
            return {}
        embedded = network.embed(torch.stack(images).to(device), is_blank)
        rows = torch.tensor([row[record.image] for record in part], device=device)
        sentences = [processor.clean(record.sentence) for record in part]
        ids, is_valid = tokenize(processor.tokenizer, sentences, processor.text_max_tokens)
        processor.warn_of_cuts(sentences, is_valid.sum(dim=1))
        found = network.classify(embedded[rows], ids.to(device), is_valid.to(device)).softmax(dim=1).tolist()
        return {record.pair_id: tuple(values) for record, values in zip(part, found, strict=True)}

    parts = range(0, len(ordered), batch_size)
    return {name: values for found in map_over_ranks(classify, parts) for name, values in found.items()}


def likeliest(probabilities: Probabilities) -> dict[str, str]:
    """Return the likeliest label by pair_id."""
    return {
        name: ENTAILMENT_LABELS[max(range(len(values)), key=values.__getitem__)]
        for name, values in probabilities.items()
    }


def evaluate_entailment(config: EntailmentConfig, predictor: Predictor, folder: Path) -> Metrics:
    """Compute `entailment/` accuracy, majority, interval and accuracy by label in percent; write the predictions.

    `text_only/accuracy` is that of the same network with blank pictures. Facts are the numbers of pairs and of those
    that were skipped.
    """
    data, batch_size, is_text_only = config.data, config.evaluation.batch_size, config.entailment.text_only
    records, load_image = evaluation_records(data, EntailmentRecord, config.evaluation.probe_items)
    with eval_mode(predictor.network):
        policy = bad_sample_policy(data)
        found = predict_entailment(predictor, records, load_image, batch_size, policy, is_text_only)
        require_some(found)
        kept = [record for record in records if record.pair_id in found]
        blank = found if is_text_only else predict_entailment(predictor, kept, load_image, batch_size, is_blank=True)
    write = functools.partial(write_predictions, probabilities=found, records=kept)
    map_over_ranks(write, [folder / PREDICTIONS])  # on rank 0
    labels = {record.pair_id: record.label for record in kept}
    images = {record.pair_id: record.image for record in kept}
    metrics = entailment_metrics(likeliest(found), labels, images)
    text_only = entailment_metrics(likeliest(blank), labels, images)["accuracy"]
    facts = {"pairs": len(kept), "skipped": len(records) - len(kept)}
    named = {f"entailment/{name}": value for name, value in metrics.items()}
    return Metrics({**named, "text_only/accuracy": text_only}, facts)


def write_predictions(file: Path, probabilities: Probabilities, records: Sequence[EntailmentRecord]) -> None:
    """Write pair_id, label and the probability of each label as JSON Lines, in the order of the records."""
    write_json_lines(
        file,
        (
            {
                "pair_id": record.pair_id,
                "label": record.label,
                **dict(zip(ENTAILMENT_LABELS, probabilities[record.pair_id], strict=True)),
            }
            for record in records
        ),
    )


def refuse_training_images(config: EntailmentConfig, train_files: Sequence[str]) -> None:
    """Raise ValueError, naming the first, where an evaluation sentence is about a training image; links are followed.

    A training file that is gone cannot be compared; the log says so. Scenes cannot overlap.
    """
    if config.data.source != "records" or config.data.eval_path is None:
        return
    found = [file for file in train_files if Path(file).is_file()]
    if len(found) < len(train_files):
        logger.warning("training files that are gone cannot be compared with %s", config.data.eval_path)
    if not found:
        return
    path_of = functools.cache(os.path.realpath)
    seen = {path_of(record.image) for record in file_records(found, EntailmentRecord)[0]}
    held_out = file_records([config.data.eval_path], EntailmentRecord)[0]
    same = [record for record in held_out if path_of(record.image) in seen]
    if same:
        name = f"pair_id {same[0].pair_id} ({image_names(same[0])[0]})"
        raise ValueError(
            f"{config.data.eval_path}: {len(same)} sentences are about images of the training data, the first is "
            f"{name}; name a held-out file"
        )


def confusion_table(file: Path) -> str:
    """Return the HTML table of a predictions file: rows of true labels, columns of predicted ones, in percent."""
    rows = [parse_json(line) for line in read_lines(file) if line.strip()]
    counts = Counter((str(row["label"]), str(max(ENTAILMENT_LABELS, key=row.__getitem__))) for row in rows)
    return "<table class=confusion>" + "".join(_table_rows(counts)) + "</table>"


def _table_rows(counts: Mapping[tuple[str, str], int]) -> list[str]:
    heads = "".join(f"<th>{html.escape(label)}</th>" for label in ENTAILMENT_LABELS)
    lines = [f"<tr><th></th><th></th>{heads}</tr>"]
    for gold in ENTAILMENT_LABELS:
        total = sum(counts.get((gold, label), 0) for label in ENTAILMENT_LABELS)
        cells = [100 * counts.get((gold, label), 0) / max(1, total) for label in ENTAILMENT_LABELS]
        shown = "".join(f"<td class=n>{share:.1f}</td>" for share in cells)
        lines.append(f"<tr><th>{html.escape(gold)}</th><td class=n>{total:,}</td>{shown}</tr>")
    return lines
