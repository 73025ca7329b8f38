"""Accuracy of visual entailment (SNLI-VE: plain three-way accuracy), whole and by label, with the majority."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from mamo.evaluation.metrics.completeness import check_predictions
from mamo.evaluation.metrics.statements import clustered_interval


def entailment_metrics(
    predictions: Mapping[str, str], labels: Mapping[str, str], images: Mapping[str, str]
) -> dict[str, float]:
    """Compute the accuracies in percent, from predictions, labels and image names by pair_id.

    `accuracy` is that of all pairs, `majority` that of the commonest label, `interval_low` and `interval_high` a 95 %
    interval by bootstrap over images, `LABEL` the share of the pairs of a label that are right.

    Raises ValueError, naming the first, for a pair without prediction and a prediction without pair.
    """
    check_predictions("visual entailment", "pair", predictions, labels, "pair_id ")
    names = list(labels)
    is_right = np.array([predictions[name] == labels[name] for name in names])
    _, cluster = np.unique([images[name] for name in names], return_inverse=True)
    low, high = clustered_interval(is_right, cluster)
    counts = Counter(labels.values())
    right = Counter(label for name, label in labels.items() if predictions[name] == label)
    return {
        "accuracy": 100 * float(is_right.mean()),
        "majority": 100 * max(counts.values()) / len(names),
        "interval_low": 100 * low,
        "interval_high": 100 * high,
        **{label: 100 * right[label] / counts[label] for label in sorted(counts)},
    }
