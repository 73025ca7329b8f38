"""Metrics of items against published numbers, naive loops, and enumeration."""

import gzip
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamo.data.items import Item
from mamo.evaluation.metrics.items import (
    Judgement,
    Scores,
    item_chances,
    item_metrics,
    judge,
    n_ties,
    set_scores,
    text_text_values,
)

CUT = Path(__file__).parents[2] / "fixtures" / "fine_grained"
WHOLE = Path(os.environ.get("MAMO_TEST_DATA", "absent")) / "fine-grained" / "scores"
needs_whole = pytest.mark.skipif(not WHOLE.is_dir(), reason="MAMO_TEST_DATA names no folder with fine-grained/scores")
Scored = list[tuple[Item, Scores]]


def rows_of(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines()]


def make(scores: Any, right: Iterable[tuple[int, int]], identifier: str = "1", **over: Any) -> tuple[Item, Scores]:
    score = np.array(scores, dtype=np.float64)
    images, texts = ([f"{identifier}-{k}" for k in range(n)] for n in score.shape)
    return Item(
        **{"images": images, "texts": texts, "right": list(right), "group": "g", "id": identifier, **over}
    ), score


def winoground(file: Path) -> Scored:
    by: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows_of(file):
        item, text, image = row["label"].split("_")
        by[item][int(image[1]), int(text[1])] = row["score"]
    return [make([[s[0, 0], s[0, 1]], [s[1, 0], s[1, 1]]], [(0, 0), (1, 1)], item) for item, s in by.items()]


def valse(file: Path) -> Scored:
    by: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows_of(file):
        by[row["instrument"], row["id"]][row["type"]] = row["score"]
    return [make([[s["caption"], s["foil"]]], [(0, 0)], f"{k}-{n}", group=k) for (k, n), s in by.items()]


def vsr(file: Path) -> Scored:
    return [make([[r["score"]]], [(0, 0)] if r["label"] else [], str(k)) for k, r in enumerate(rows_of(file))]


def metrics_of(scored: Scored, threshold: float = 0.0) -> dict[str, float]:
    items = [item for item, _ in scored]
    return item_metrics(items, [judge(item, score, threshold) for item, score in scored])


@needs_whole
@pytest.mark.parametrize(
    ("model", "text", "image", "group"), [("albef_4m", 29.25, 15.5, 11.0), ("x-vlm_4m", 44.0, 26.75, 21.5)]
)
def test_winoground_as_published(model: str, text: float, image: float, group: float) -> None:
    """Bug: image and text exchanged, or a group that asks for one of both only."""
    found = metrics_of(winoground(WHOLE / "winoground" / f"{model}.jsonl"))
    assert [found[name] for name in ("text", "image", "group", "accuracy")] == [text, image, group, group]
    assert found["text_low"] < text - 3 < text + 3 < found["text_high"]  # about 4.5 points at 400 items


INSTRUMENTS = ("existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations",
               "action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it")  # fmt: skip


@needs_whole
@pytest.mark.parametrize(
    ("model", "micro", "macro", "by"),
    [
        ("albef_4m", 69.10, 67.8, (71.3, 78.8, 62.2, 65.1, 59.8, 73.1, 73.6, 58.4, 52.4, 55.8, 95.5)),
        ("x-vlm_4m", 72.41, 70.5, (80.0, 77.8, 69.0, 68.4, 72.5, 74.8, 77.3, 65.0, 50.1, 48.1, 92.5)),
    ],
)
def test_valse_as_published(model: str, micro: float, macro: float, by: tuple[float, ...]) -> None:
    """Bug: a mean over groups printed as the mean over items, groups mixed up, a tie counted as right."""
    found = metrics_of(valse(WHOLE / "valse" / f"{model}.jsonl.gz"))
    assert round(found["accuracy"], 2) == micro
    assert round(found["macro"], 1) == macro
    assert tuple(round(found[f"by/{name}"], 1) for name in INSTRUMENTS) == by


@needs_whole
@pytest.mark.parametrize(("model", "accuracy"), [("albef_4m", 57.3), ("x-vlm_4m", 63.0)])
def test_vsr_as_published(model: str, accuracy: float) -> None:
    """Bug: a false statement that counts as right where the network calls it true."""
    found = metrics_of(vsr(WHOLE / "vsr" / f"{model}_test.jsonl"), threshold=0.5)
    assert round(found["accuracy"], 1) == accuracy


def test_cuts_agree_with_naive_loops() -> None:
    """Bug: another rule than strictly greater, another axis; on the cuts that lie here."""
    scored = winoground(CUT / "winoground_scores.jsonl")
    found = metrics_of(scored)
    text = [s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0] for _, s in scored]
    image = [s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1] for _, s in scored]
    assert found["text"] == pytest.approx(100 * np.mean(text))
    assert found["image"] == pytest.approx(100 * np.mean(image))
    assert found["group"] == pytest.approx(100 * np.mean(np.array(text) & np.array(image)))
    found = metrics_of(valse(CUT / "valse_scores.jsonl"))
    rows = rows_of(CUT / "valse_scores.jsonl")
    right = defaultdict(list)
    for caption, foil in zip(rows[::2], rows[1::2]):
        assert (caption["type"], foil["type"]) == ("caption", "foil")
        right[caption["instrument"]].append(caption["score"] > foil["score"])
    assert {k: found[f"by/{k}"] for k in right} == pytest.approx({k: 100 * np.mean(v) for k, v in right.items()})
    assert found["macro"] == pytest.approx(np.mean([100 * np.mean(v) for v in right.values()]))
    rows = rows_of(CUT / "vsr_scores.jsonl")
    agreed = [(row["score"] > 0.5) == bool(row["label"]) for row in rows]
    assert metrics_of(vsr(CUT / "vsr_scores.jsonl"), 0.5)["accuracy"] == pytest.approx(100 * np.mean(agreed))


def test_ties_and_nan_are_wrong_and_counted() -> None:
    """Bug: equal scores, as of texts that are cut alike, count as right or half; NaN counts as right."""
    cases = [
        (make([[1.0, 1.0]], [(0, 0)]), 0.0, True),
        (make([[1.0, np.nan]], [(0, 0)]), 0.0, False),
        (make([[np.nan]], []), 0.0, False),
        (make([[0.0]], []), 0.0, True),
        (make([[-1.0]], []), 1.0, False),
        (make([[1.0, 2.0, 0.5]], [(0, 0), (0, 1)]), 1.0, False),
        (make([[1.0, 2.0, 1.0]], [(0, 0), (0, 1)]), 0.0, True),
        (make([[3.0], [2.0]], [(0, 0)]), 1.0, False),
    ]
    for (item, score), value, is_tied in cases:
        found = judge(item, score)
        assert (found.accuracy, found.is_tied) == (value, is_tied), score
    assert judge(*make([[1.0, 1.0]], [(0, 0)]), tie=0.5).accuracy == 0.5  # the probes' rule
    assert n_ties(judge(item, score) for (item, score), _, _ in cases) == 3


def test_sets_count_together() -> None:
    """Bug: a set counts as right where one of its items is, or sets of two kinds are mixed."""
    sets = [{"pair": "a", "four": "x"}, {"pair": "a", "four": "x"}, {"pair": "b", "four": "x"}, {"pair": "b"}]
    items = [make([[0.0, 0.0]], [(0, 0)], str(k), set=own)[0] for k, own in enumerate(sets)]
    assert set_scores(items, [1.0, 1.0, 0.0, 1.0]) == {"pair": 0.5, "four": 0.0}


@pytest.mark.parametrize(
    ("shape", "right"),
    [
        ((1, 2), [(0, 0)]),
        ((1, 5), [(0, 2)]),
        ((1, 3), [(0, 0), (0, 1)]),
        ((2, 1), [(1, 0)]),
        ((2, 2), [(0, 0), (1, 1)]),
    ],
)
def test_chance_is_that_of_all_orders(shape: tuple[int, int], right: list[tuple[int, int]]) -> None:
    """Bug: Winoground's group chance as 1/4 or 1/16; it is 1/6."""
    n = shape[0] * shape[1]
    item = make(np.zeros(shape), right)[0]
    found: list[Judgement] = [judge(item, np.reshape(order, shape)) for order in itertools.permutations(range(n))]
    chances = item_chances([item])
    assert chances["accuracy"] == pytest.approx(100 * np.mean([j.accuracy for j in found]))
    if shape == (2, 2):
        assert [chances[name] for name in ("text", "image", "group")] == pytest.approx([25, 25, 100 / 6])


def test_the_interval_is_that_of_images() -> None:
    """Bug: a bootstrap over items calls a hundred items of two images as certain as those of a hundred."""
    few = [make([[k % 2, 0.5]], [(0, 0)], str(k), images=[f"{k % 2}.jpg"]) for k in range(100)]
    many = [make([[k % 2, 0.5]], [(0, 0)], str(k)) for k in range(100)]
    widths = [(found := metrics_of(scored))["accuracy_high"] - found["accuracy_low"] for scored in (few, many)]
    assert widths[0] == 100
    assert 15 < widths[1] < 25  # 4 x 5 points, binomial


def test_macro_leaves_small_groups_out() -> None:
    """Bug: an attribute pair with one item counts as much as one with a hundred (ARO counts from 25 items on)."""
    scored = [make([[1.0, 0.0]], [(0, 0)], str(k), group="large") for k in range(3)]
    scored.append(make([[0.0, 1.0]], [(0, 0)], "x", group="small"))
    judged = [judge(item, score) for item, score in scored]
    items = [item for item, _ in scored]
    assert item_metrics(items, judged)["macro"] == 50
    assert item_metrics(items, judged, least_in_group=3)["macro"] == 100
    assert "macro" not in item_metrics(items, judged, least_in_group=9)


def test_texts_are_compared_without_images() -> None:
    """Bug: only one of the two comparisons with the wrong text is asked."""
    item = make([[0.0, 0.0, 0.0]], [(0, 0), (0, 1)])[0]
    for pair, first, second, value in ((0.9, 0.5, 0.4, 1), (0.9, 0.5, 0.95, 0), (0.9, 0.9, 0.1, 0)):
        assert text_text_values([item], [{(0, 1): pair, (0, 2): first, (1, 2): second}]) == [value]
