"""Telling true from false sentences about an image by a score: accuracy with its interval, beside the majority class.

Legend: N statements, S distinct sentences.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    """A sentence about the image at an absolute path, whether it is true, and the group that folds must not split."""

    image: str
    sentence: str
    label: bool
    directory: str


def read_statements(path: Path) -> list[StatementRecord]:
    """Reads JSON Lines of `image` (relative to the file's folder), `sentence`, `label` (a JSON boolean), `directory`.

    Raises ValueError naming file, line and field where a row is wrong, or where there is none.
    """
    records = []
    for number, line in enumerate(read_lines(path, "; build it with `data.py build nlvr`"), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error.msg}); write one object a line") from None
        for field, kind in _FIELDS.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise ValueError(f"{path}:{number}: needs field '{field}' of type {kind.__name__}")
        image = str(path.parent.absolute() / row["image"])
        records.append(StatementRecord(image, row["sentence"], row["label"], row["directory"]))
    if not records:
        raise ValueError(f"{path}: holds no statement")
    return records


def statement_metrics(score: Floats, records: list[StatementRecord]) -> dict[str, float]:
    """Scores float [N] (higher means true) -> accuracy, majority, interval_low, interval_high in percent.

    The accuracy uses, for each fold, the threshold that is best on the others (`fold_predictions`).
    """
    label = np.array([record.label for record in records])
    return truth_metrics(fold_predictions(score, label, folds_of([record.directory for record in records])), records)


def truth_metrics(predicted: Bools, records: list[StatementRecord]) -> dict[str, float]:
    """What is called true, bool [N] -> accuracy, majority, interval_low, interval_high in percent.

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
    """`interval_low` and `interval_high` in percent: `clustered_interval` of bool [N] over the N sentences."""
    _, cluster = np.unique(sentences, return_inverse=True)
    low, high = clustered_interval(is_right, cluster)
    return {"interval_low": 100.0 * low, "interval_high": 100.0 * high}


def write_scores(file: Path, score: Floats, records: list[StatementRecord]) -> None:
    """Writes the scores [N] as JSON Lines beside what `statement_metrics` needs, so that folds can be pooled."""
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
    """What `write_scores` wrote. Raises ValueError naming the file and the line where it is not that."""
    scores = []
    for number, line in enumerate(read_lines(file), 1):
        try:
            scores.append(float(json.loads(line)["score"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: not a row of statement scores; evaluate that run again") from None
    return np.array(scores), read_statements(file)


def folds_of(directories: list[str]) -> Ints:
    """The fold of each statement, int64 [N]: distinct directories in sorted order are dealt to `N_FOLDS` folds."""
    _, number = np.unique(directories, return_inverse=True)
    return number.astype(np.int64) % N_FOLDS


def fold_predictions(score: Floats, label: Bools, fold: Ints) -> Bools:
    """Which statements are called true: score above the threshold that fits the other folds best, bool [N].

    With one fold alone there is nothing to fit on, and the threshold is 0: match likelier than mismatch.
    """
    predicted = np.zeros(len(score), dtype=np.bool_)
    for held_out in np.unique(fold):
        is_here = fold == held_out
        threshold = 0.0 if is_here.all() else best_threshold(score[~is_here], label[~is_here])
        predicted[is_here] = score[is_here] > threshold
    return predicted


def best_threshold(score: Floats, label: Bools) -> float:
    """The threshold with the most right answers of `score > threshold`: between two neighbouring scores, or infinite.

    Of several equally good ones, the lowest.
    """
    values = np.unique(score)
    cuts = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    # At cut k the k lowest distinct scores are called false.
    place = np.searchsorted(values, score)
    net = np.bincount(place, weights=np.where(label, -1.0, 1.0), minlength=len(values))  # gain of calling it false
    return float(cuts[np.argmax(np.concatenate([[0.0], np.cumsum(net)]))])


def clustered_interval(is_right: Bools, cluster: Ints) -> tuple[float, float]:
    """95 % interval of the mean of `is_right` bool [N]: a percentile bootstrap over clusters int64 [N] (0 to S-1).

    The statements of a cluster (one sentence of several pictures) are not independent: whole clusters are drawn with
    replacement, `_N_RESAMPLES` times, from a fixed seed.
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
