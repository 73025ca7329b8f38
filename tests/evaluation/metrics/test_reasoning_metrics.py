"""NLVR's accuracy and consistency on cases small enough to count by hand."""

import pytest

from mamo.evaluation.metrics.reasoning import reasoning_metrics, sentence_of


def test_consistency_groups_the_pairs_of_one_sentence() -> None:
    """Would catch grouping by image set, by pair, or by the sentence's number across sets."""
    labels = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-0-1": True, "dev-2-0-0": True, "dev-2-1-0": True}
    predictions = {**labels, "dev-2-1-0": False}
    found = reasoning_metrics(predictions, labels)
    assert found == {"accuracy": 80, "consistency": pytest.approx(200 / 3), "majority": 80}


def test_nlvr_groups_all_records_and_permutations_of_one_sentence() -> None:
    """Would catch consistency over the permutations of one record alone."""
    labels = {f"7-{m}-{k}": m == 0 for m in range(2) for k in range(6)} | {"8-0-0": True}
    assert reasoning_metrics(labels, labels)["consistency"] == 100
    found = reasoning_metrics({**labels, "7-1-5": True}, labels)
    assert found["consistency"] == 50
    assert found["accuracy"] == pytest.approx(100 * 12 / 13)
    assert found["majority"] == pytest.approx(100 * 7 / 13)


def test_mistakes_are_told() -> None:
    """Would catch an accuracy over the predicted statements alone, and a made-up grouping."""
    with pytest.raises(ValueError, match="1 statements have no prediction, the first is dev-1-1-0"):
        reasoning_metrics({"dev-1-0-0": True}, {"dev-1-0-0": True, "dev-1-1-0": True})
    with pytest.raises(ValueError, match="1 predictions are of no statement of the split, the first is 9-9"):
        reasoning_metrics({"9-9": True}, {})
    for identifier in ("abc", "1-2-3-4", "dev-1-2"):
        with pytest.raises(ValueError, match=identifier):
            sentence_of(identifier)
