"""Evaluation of `evaluation.items_files`: fine-grained sets, and a user's own items."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.data.items import ItemFile, read_items
from mamo.data.pairs_reader import write_json_lines
from mamo.distributed import map_over_ranks
from mamo.evaluation.fine_grained import SETS, how_to_get, is_official
from mamo.evaluation.items import ScoredItems, check_boxes, evaluate_items
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.results import Metrics
from mamo.evaluation.scorer import Scorer, eval_mode
from mamo.reports.items import items_section

logger = logging.getLogger(__name__)


def read_item_files(config: RunConfig) -> list[tuple[ItemFile, int]]:
    """Read `evaluation.items_files`, and the headers of the images that they crop; no image is decoded.

    Returns:
        Each file, and the number of its boxes that are not inside their image.

    Raises:
        ValueError: a malformed row or a box outside, with file, line and field; a file that cannot be read.
    """
    found = []
    for name in config.evaluation.items_files:
        path = Path(name)
        known = is_official(path)
        root = path.parent.parent if path.parent.name == path.stem else path.parent
        file = read_items(path, known, f"; {how_to_get(root, path.stem)}" if known else "")
        found.append((file, check_boxes(file, known)))
    return found


def evaluate_item_files(predictor: Predictor, config: RunConfig, folder: Path) -> Metrics:
    """Score `evaluation.items_files` by the scores of `evaluation.items_scores`, in the precision of the weights.

    Args:
        predictor: its network is evaluated in eval mode; the modes of its modules are restored.
        config: `evaluation` is read.
        folder: takes the scores of each item, `items-STEM.jsonl`.

    Returns:
        `items/STEM/SCORE/METRIC` in percent, with facts of the same form, and `files` by stem.

    Raises:
        ValueError: as `read_item_files`; no item of a file can be scored.
    """
    metrics = Metrics({})
    scorer = Scorer(predictor, config.evaluation.batch_size)
    for file, n_outside in read_item_files(config):
        name = file.path.stem
        known = SETS.get(name)
        with eval_mode(predictor.network):
            least = 1 if known is None else known.least_in_group
            found, scored = evaluate_items(scorer, file, config.evaluation.items_scores, least)
        described: Values = {
            "file": str(file.path),
            "sha256": file.sha256,
            "items": len(file.items),
            "scored": len(scored.items),
            "ties": "wrong",
            "crop": "boxes of the file" if any(item.boxes for item in file.items) else "none",
            "boxes_cut_at_edges": n_outside,
            "cleaning": predictor.processor.cleaning,
            "macro_of_groups_from": least,
            "weights": str(next(predictor.network.parameters()).dtype).removeprefix("torch."),
        }
        facts = {f"items/{name}/{key}": value for key, value in found.facts.items()}
        own = {f"items/{name}/{key}": value for key, value in found.items()}
        metrics = metrics | Metrics(own, facts, {name: described})
        say_what_is_special(name, scored)
        write = functools.partial(_write_scores, scored)
        map_over_ranks(write, [scores_file(folder, name)])  # on rank 0
    return metrics


def item_sections(config: RunConfig, folder: Path) -> list[tuple[str, str]]:
    """Build the report's section of each file whose scores `evaluate_item_files` wrote into `folder`."""
    files = [Path(name) for name in config.evaluation.items_files]
    return [
        items_section(file, scores_file(folder, file.stem), is_official(file))
        for file in files
        if scores_file(folder, file.stem).is_file()
    ]


def _write_scores(scored: ScoredItems, file: Path) -> None:
    write_json_lines(file, score_rows(scored))


def say_what_is_special(name: str, scored: ScoredItems) -> None:
    """Log how many items were not scored, and how many have texts that no network can tell apart."""
    n_left_out = int(scored.facts["items"]) - len(scored.items)
    if n_left_out:
        logger.warning("%s: %d items are not scored, an image is missing; %d are", name, n_left_out, len(scored.items))
    if scored.facts["same_texts"]:
        logger.warning(
            "%s: %d items have texts that are equal after cleaning and cutting; they count as wrong",
            name,
            scored.facts["same_texts"],
        )


def scores_file(folder: Path, name: str) -> Path:
    """Return the file of the scores of each item of a set."""
    return folder / f"items-{name}.jsonl"


def score_rows(scored: ScoredItems) -> Iterator[dict[str, Any]]:
    """Yield id, group, right pairs and scores [I, T] of each item."""
    for number, item in enumerate(scored.items):
        scores = {name: own[number].tolist() for name, own in scored.scores.items()}
        yield {"id": item.id, "group": item.group, "right": [list(pair) for pair in item.right], "scores": scores}
