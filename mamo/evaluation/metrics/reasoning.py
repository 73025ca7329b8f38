"""Accuracy and consistency of NLVR and NLVR2 (Suhr et al. 2017, 2019), from statement identifiers."""

from collections import defaultdict
from collections.abc import Mapping

from mamo.data.judge import sentence_of
from mamo.evaluation.metrics.completeness import check_predictions


def reasoning_metrics(predictions: Mapping[str, bool], labels: Mapping[str, bool]) -> dict[str, float]:
    """Compute `accuracy`, `consistency` and `majority` in percent, from predictions and labels by identifier.

    Consistency is the share of sentences that are judged right for all their images. Statements share a sentence where
    the identifiers `split-set-pair-sentence` (NLVR2) agree except for the pair, or `n-m`, with or without a permutation
    `-k` (NLVR), agree in n.

    Raises ValueError, naming the first, for a statement without prediction, a prediction without statement, and an
    identifier of neither form.
    """
    check_predictions("NLVR", "statement", predictions, labels)
    is_right = {identifier: predictions[identifier] == label for identifier, label in labels.items()}
    groups: dict[str, list[bool]] = defaultdict(list)
    for identifier, right in is_right.items():
        groups[sentence_of(identifier)].append(right)
    n_true = sum(labels.values())
    return {
        "accuracy": 100 * sum(is_right.values()) / len(labels),
        "consistency": 100 * sum(all(group) for group in groups.values()) / len(groups),
        "majority": 100 * max(n_true, len(labels) - n_true) / len(labels),
    }
