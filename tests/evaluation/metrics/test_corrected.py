"""Metrics of COCO with corrected negatives: against naive loops over the labels, and what their input must be."""

import sys

import numpy as np
import pytest

from mamo.evaluation.metrics.corrected import corrected_metrics, load_labels

pytest.importorskip("eccv_caption")


@pytest.fixture(scope="module")
def rankings() -> dict[str, dict[int, list[int]]]:
    """Sixty items for each query: right ones of the original labels among random ones."""
    labels, rng = load_labels(), np.random.default_rng(0)
    found = {}
    for way, other in (("i2t", "t2i"), ("t2i", "i2t")):
        gallery = np.array(list(labels.coco_gts[other]))
        drawn = rng.integers(len(gallery), size=(len(labels.coco_gts[way]), 60))
        found[way] = {}
        for (query, right), row in zip(labels.coco_gts[way].items(), gallery[drawn].tolist()):
            own = [*right, *labels.eccv_gts[way].get(query, [])][: int(rng.integers(8))]
            place = int(rng.integers(4))
            found[way][query] = list(dict.fromkeys([*row[:place], *own, *row[place:]]))[:58]
    return found


def test_metrics_are_those_of_naive_loops(rankings: dict[str, dict[int, list[int]]]) -> None:
    """Bug: directions or data sets exchanged, the precision at another depth than the number of right items;
    a sixth caption of an image, which the labels do not have, counts as wrong."""
    labels = load_labels()
    found = corrected_metrics(rankings["i2t"], rankings["t2i"])
    for way in ("i2t", "t2i"):
        precision, average, first = [], [], []
        for query, right in labels.eccv_gts[way].items():
            is_right = np.isin(rankings[way][query][: len(right)], right)
            precision.append(is_right.mean())
            average.append((np.cumsum(is_right) / np.arange(1, len(right) + 1) * is_right).mean())
            first.append(is_right[0])
        assert found[f"eccv/{way}_rprecision"] == pytest.approx(100 * np.mean(precision))
        assert found[f"eccv/{way}_map_at_r"] == pytest.approx(100 * np.mean(average))
        assert found[f"eccv/{way}_r1"] == pytest.approx(100 * np.mean(first))
        for depth in (1, 5, 10):
            hits = [bool(set(rankings[way][q][:depth]) & set(right)) for q, right in labels.cxc_gts[way].items()]
            assert found[f"cxc/{way}_r{depth}"] == pytest.approx(100 * np.mean(hits))
    assert 5 < found["eccv/i2t_rprecision"] < 95
    few = {query: [1, *items] for query, items in rankings["i2t"].items()}
    assert corrected_metrics(few, rankings["t2i"]) == found


def test_mistakes_are_one_line(rankings: dict[str, dict[int, list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an IndexError for a gallery that is not COCO's test split, or for rankings that are too short."""
    some = dict(list(rankings["i2t"].items())[:10])
    with pytest.raises(ValueError, match=r"image \d+ of COCO's test split has no ranking of \d+ items; build"):
        corrected_metrics(some, rankings["t2i"])
    short = {query: items[:3] for query, items in rankings["t2i"].items()}
    with pytest.raises(ValueError, match=r"caption \d+ of COCO.*raise evaluation\.rankings_depth"):
        corrected_metrics(rankings["i2t"], short)
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(ValueError, match=r"install it with `pip install mamo\[eccv\]`"):
        load_labels()
