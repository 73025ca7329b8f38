"""The report: one page that needs nothing else, with hits and misses where they are."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamo.config import Config
from mamo.evaluation import pictures
from mamo.tasks.evaluate import evaluate
from mamo.tasks.launch import train
from mamo.training.report import write_report


class Page(HTMLParser):
    """Collects images and headings, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.mark.usefixtures("one_thread")
def test_a_run_and_an_evaluation_write_their_page(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Bug: a page that asks the network for something, unescaped text, pictures that do not decode, no curves."""
    few = {"enabled": True, "retrieval_items": 6, "probe_items": 4, "rerank_k": 2}
    train(tiny(training={"total_steps": 2, "warmup_steps": 1}, evaluation=few), is_resume=False)
    evaluate(tmp_path / "run", "scenes-easy-zeroshot", [f"evaluation.{k}={v}" for k, v in few.items()], pictures=True)
    for file in (tmp_path / "run/report.html", tmp_path / "run/evaluations/scenes-easy-zeroshot/report.html"):
        text = file.read_text()
        assert not re.search(r"https?://|<script|<link", text)
        page = Page(text)
        assert [heading.split(",")[0] for heading in page.headings] == [
            "Numbers", "Images to texts", "Texts to images", "What an expression means: Grad-CAM of the match",
            "Masked words", "Losses and metrics",
        ]  # fmt: skip
        for image in page.images:
            assert image["alt"]
            data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
            assert min(Image.open(io.BytesIO(data)).size) >= 16
        assert len(page.images) > pictures.SHOWN * (1 + pictures.TOP)


def test_hits_and_misses_are_marked() -> None:
    """Bug: the diagonal taken for the ranking, or the worst shown for the best."""
    n = 12
    score = torch.arange(n * n, dtype=torch.float).view(n, n) % 7  # column k % 7 == 6 - row-dependent ties aside
    score[torch.arange(n), torch.arange(n)] = torch.tensor([100.0 if k % 2 else -1.0 for k in range(n)])
    shown = [np.full((16, 16, 3), k, np.uint8) for k in range(n)]
    names = [f"<{k}>" for k in range(n)]
    rows = pictures._to_texts(score, shown, names).split('<div class="row">')[1:]
    assert len(rows) == pictures.SHOWN
    for k, row in enumerate(rows):
        listed = re.findall(r'<li class="(\w+)">&lt;(\d+)&gt;', row)
        assert [int(text) for _, text in listed] == score[k].topk(pictures.TOP).indices.tolist()
        assert [kind == "hit" for kind, _ in listed] == [int(text) == k for _, text in listed]
        assert (listed[0] == ("hit", str(k))) == bool(k % 2)


def test_heat_and_boxes_are_where_they_belong() -> None:
    """Bug: axes exchanged, or boxes in patches instead of pixels."""
    heat = np.zeros((20, 40))
    heat[5:8, 30:34] = 1
    drawn = pictures.overlay(np.full((20, 40, 3), 120, np.uint8), heat, [((2, 10, 6, 5), (0, 255, 0))]).astype(int)
    scale = drawn.shape[0] // 20
    assert drawn.shape == (20 * scale, 40 * scale, 3)
    red = drawn[..., 0] - drawn[..., 1]
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert (5 <= row / scale < 8, 30 <= column / scale < 34) == (True, True)
    green = np.argwhere((drawn == (0, 255, 0)).all(axis=2))
    assert green.min(axis=0).tolist() == [10 * scale, 2 * scale]
    assert green.max(axis=0).tolist() == [15 * scale - 1, 8 * scale - 1]


def test_text_is_escaped(tmp_path: Path) -> None:
    """Bug: a folder's name that breaks the page."""
    page = write_report(tmp_path, "<b>&", {"a<b": 1.0}, []).read_text()
    assert "<h1>&lt;b&gt;&amp;</h1>" in page
    assert "a&lt;b" in page
