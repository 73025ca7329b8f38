"""Accuracy of a score that separates true from false sentences about an image, with interval and majority baseline.

Legend: N statements, S distinct sentences.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamo.data.files import JsonError, parse_json
from mamo.data.pairs_reader import read_lines, write_json_lines

N_FOLDS = 6
_N_RESAMPLES = 2000
_SEED = 0
_FIELDS = {"image": str, "sentence": str, "label": bool, "directory": str}

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StatementRecord:
    """A sentence about the image at an absolute path, its label, and the group that folds must not split."""

    image: str
    sentence: str
    label: bool
    directory: str


def read_statements(path: Path) -> list[StatementRecord]:
    """Read JSON Lines of `image` (relative to the file's folder), `sentence`, `label` (a JSON boolean), `directory`.

    Raises ValueError naming file, line and field of a malformed row, and for a file without rows.
    """
    records = []
    for number, line in enumerate(read_lines(path, "; build it with `data.py build nlvr`"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except JsonError as error:
            raise ValueError(f"{path}:{number}: {error}; write one object per line") from None
        for field, kind in _FIELDS.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise ValueError(f"{path}:{number}: needs field '{field}' of type {kind.__name__}")
        image = str(path.parent.absolute() / row["image"])
        records.append(StatementRecord(image, row["sentence"], row["label"], row["directory"]))
    if not records:
        raise ValueError(f"{path}: no statements in this file")
    return records


def statement_metrics(score: Floats, records: list[StatementRecord]) -> dict[str, float]:
    """Compute accuracy, majority, interval_low, interval_high in percent from scores float [N] (higher means true).

    For each fold, the threshold is the best one on the other folds (`fold_predictions`).
    """
    label = np.array([record.label for record in records])
    return truth_metrics(fold_predictions(score, label, folds_of([record.directory for record in records])), records)


def truth_metrics(predicted: Bools, records: list[StatementRecord]) -> dict[str, float]:
    """Compute accuracy, majority, interval_low, interval_high in percent from predictions bool [N] (True: called true).

    The interval is `interval_by_sentence`.
    """
    label = np.array([record.label for record in records])
    is_right = predicted == label
    return {
        "accuracy": 100.0 * float(is_right.mean()),
        "majority": 100.0 * float(max(label.mean(), 1 - label.mean())),
        **interval_by_sentence(is_right, [record.sentence for record in records]),
    }


def interval_by_sentence(is_right: Bools, sentences: list[str]) -> dict[str, float]:
    """Compute `interval_low` and `interval_high` in percent: `clustered_interval` of bool [N] by sentence."""
    _, cluster = np.unique(sentences, return_inverse=True)
    low, high = clustered_interval(is_right, cluster)
    return {"interval_low": 100.0 * low, "interval_high": 100.0 * high}


def write_scores(file: Path, score: Floats, records: list[StatementRecord]) -> None:
    """Write the scores [N] as JSON Lines with the fields that `statement_metrics` needs, to pool folds later."""
    rows = (
        {
            "score": value,
            "sentence": r.sentence,
            "label": r.label,
            "directory": r.directory,
            "image": Path(r.image).name,
        }
        for value, r in zip(score.tolist(), records, strict=True)
    )
    write_json_lines(file, rows)


def read_scores(file: Path) -> tuple[Floats, list[StatementRecord]]:
    """Read a file of `write_scores`. Raises ValueError naming the file and the malformed line."""
    scores = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            scores.append(float(parse_json(line)["score"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: not a row of statement scores; evaluate that run again") from None
    return np.array(scores), read_statements(file)


def folds_of(directories: list[str]) -> Ints:
    """Assign a fold to each statement, int64 [N]: distinct directories in sorted order, in turn to `N_FOLDS` folds."""
    _, number = np.unique(directories, return_inverse=True)
    return number.astype(np.int64) % N_FOLDS


def fold_predictions(score: Floats, label: Bools, fold: Ints) -> Bools:
    """Predict which statements are true, bool [N]: score above the threshold that is best on the other folds.

    With a single fold there is no other to fit on, and the threshold is 0: match likelier than mismatch.
    """
    predicted = np.zeros(len(score), dtype=np.bool_)
    for held_out in np.unique(fold):
        is_here = fold == held_out
        threshold = 0.0 if is_here.all() else best_threshold(score[~is_here], label[~is_here])
        predicted[is_here] = score[is_here] > threshold
    return predicted


def best_threshold(score: Floats, label: Bools) -> float:
    """Return the threshold of `score > threshold` with the most right answers; of equally good ones the lowest.

    It lies between two neighbouring scores, or is infinite.
    """
    values = np.unique(score)
    cuts = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    # At cut k the k lowest distinct scores are called false.
    place = np.searchsorted(values, score)
    net = np.bincount(place, weights=np.where(label, -1.0, 1.0), minlength=len(values))  # gain of calling it false
    return float(cuts[np.argmax(np.concatenate([[0.0], np.cumsum(net)]))])


def clustered_interval(is_right: Bools | Floats, cluster: Ints) -> tuple[float, float]:
    """Compute a 95 % interval of the mean of `is_right` [N], by percentile bootstrap over clusters int64 [N].

    The statements of a cluster (one sentence with several images) are not independent: whole clusters are resampled
    with replacement, `_N_RESAMPLES` times, from a fixed seed.
    """
    right = np.bincount(cluster, weights=is_right)  # [S]
    size = np.bincount(cluster)  # [S]
    rng = np.random.default_rng(_SEED)
    means = np.empty(_N_RESAMPLES)
    for k in range(_N_RESAMPLES):
        drawn = rng.integers(len(size), size=len(size))
        means[k] = right[drawn].sum() / size[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
