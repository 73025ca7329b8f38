"""Accuracy of visual entailment against hand-counted pairs."""

import pytest

from mamo.evaluation.metrics.entailment import entailment_metrics


def test_accuracy_by_label_and_majority() -> None:
    """Bug: precision instead of the share of a label's pairs, or the majority of the predictions."""
    labels = {"a": "neutral", "b": "neutral", "c": "neutral", "d": "entailment", "e": "contradiction"}
    predictions = {"a": "neutral", "b": "entailment", "c": "neutral", "d": "entailment", "e": "entailment"}
    images = {"a": "1", "b": "1", "c": "2", "d": "2", "e": "3"}
    found = entailment_metrics(predictions, labels, images)
    assert found["accuracy"] == pytest.approx(60)
    assert found["majority"] == pytest.approx(60)
    assert found["neutral"] == pytest.approx(200 / 3)
    assert (found["entailment"], found["contradiction"]) == (100, 0)
    assert found["interval_low"] <= 60 <= found["interval_high"]


def test_pairs_of_one_image_are_resampled_together() -> None:
    """Bug: an interval over pairs: those of one image are not independent, and it is too narrow."""
    labels = {str(k): "neutral" for k in range(40)}
    predictions = {str(k): "neutral" if k < 20 else "entailment" for k in range(40)}
    wide = entailment_metrics(predictions, labels, {str(k): str(k // 20) for k in range(40)})
    narrow = entailment_metrics(predictions, labels, {str(k): str(k) for k in range(40)})
    assert (wide["interval_low"], wide["interval_high"]) == (0, 100)
    assert 30 < narrow["interval_low"] < 50 < narrow["interval_high"] < 70


def test_a_pair_without_prediction_is_named() -> None:
    """Bug: accuracy over the pairs that happen to be there."""
    with pytest.raises(ValueError, match="1 pairs have no prediction, the first is pair_id b"):
        entailment_metrics({"a": "neutral"}, {"a": "neutral", "b": "neutral"}, {"a": "1", "b": "1"})
