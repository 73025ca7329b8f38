"""The section of a report about items: what is shown, and in which order."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamo.data.items import Item
from mamo.reports.items import items_section, margin


def write(folder: Path, scores: dict[str, Any]) -> tuple[Path, Path]:
    """Items of one image and two texts, the first right, with the scores of some."""
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    rows = [
        {"images": ["a.png"], "texts": [f"right <{k}>", f"wrong {k}"], "right": [[0, 0]], "group": f"g{n % 2}", "id": k}
        for n, k in enumerate(scores)
    ]
    (folder / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    scored = [{"id": k, "group": "", "right": [[0, 0]], "scores": {"itm": v}} for k, v in scores.items() if v]
    (folder / "items-x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in scored))
    return folder / "x.jsonl", folder / "items-x.jsonl"


def test_the_worst_items_come_first_with_their_pictures(tmp_path: Path) -> None:
    """Bug: the best items are shown as the worst, right ones among them, or an item with another's scores."""
    scores = {"a": [[1.0, 3.0]], "b": [[0.0, 9.0]], "c": [[5.0, 1.0]], "missing": None, "d": [[2.0, 2.0]]}
    title, page = items_section(*write(tmp_path, scores), is_official=False)
    assert title == "Fine-grained items: x"
    assert "4 of 5 items were scored" in page
    assert re.findall(r"<div>g\d: (\w+)", page) == ["b", "a", "d"]
    assert page.count("<img ") == 3
    assert '<li class="hit">right &lt;b&gt; (0.000)</li><li class="miss">wrong b (9.000)</li>' in page
    assert re.findall(r"<td>(\w+)</td><td class=n>(\d+)</td>", page) == [("all", "4"), ("g0", "3"), ("g1", "1")]
    assert page.count("left:50.0%") == 3  # chance
    assert str(tmp_path) not in page


def test_a_whole_set_that_is_right_has_no_worst_items(tmp_path: Path) -> None:
    """Bug: right items are shown as wrong ones."""
    _, page = items_section(*write(tmp_path, {"a": [[2.0, 1.0]]}), is_official=False)
    assert "No item is wrong" in page
    assert "<img" not in page


def test_the_margin_is_that_of_the_worst_comparison() -> None:
    """Bug: a pair of images counts as right by its best comparison, or a false statement by its score."""
    pair = Item(images=["a", "b"], texts=["x", "y"], right=[(0, 0), (1, 1)], group="g", id="1")
    assert margin(pair, np.array([[5.0, 1.0], [4.5, 6.0]])) == pytest.approx(0.5)
    false = Item(images=["a"], texts=["x"], right=[], group="g", id="1")
    assert margin(false, np.array([[2.0]])) == -2
