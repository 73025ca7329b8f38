"""`mamo demo`: one page of held-out pictures, judged by the heads that the network has."""

import functools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import mamo
from mamo.cli import main
from mamo.config import shipped
from mamo.inference import demo
from mamo.inference.demo import write_demo
from mamo.tasks.registry import finetune_config
from mamo.trainer import train
from mamo.world.entailment import entailment_items
from mamo.world.probes import PROBES, probe_items
from mamo.world.scene import WORLD_SEED, SceneWorld
from tests.tiny import finetuning_values, write_config


class Page(HTMLParser):
    """Collects headings, sources of images, and the texts of list items and captions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h2", "li", "figcaption"):
            self.open.append(tag)
            (self.headings if tag == "h2" else self.texts).append("")
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            found = self.headings if self.open[-1] == "h2" else self.texts
            found[-1] += data


def test_a_page_is_whole_and_names_the_head(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a page that needs files, a section left out, sentences of another picture, ITM passed off as entailment."""
    monkeypatch.setattr(shipped, "NETWORKS", tmp_path / "networks")
    main(["export", str(pretrained), "--to", str(tmp_path / "networks/scenes_1h")])
    monkeypatch.chdir(tmp_path)
    main(["demo", "--to", "shown/demo.html"])
    assert capsys.readouterr().out.splitlines()[-1] == "shown/demo.html"
    text = (tmp_path / "shown/demo.html").read_text()
    assert not re.search(r"https?://|<script|<link", text)
    page = Page(text)
    assert [re.split("[,:]", heading)[0] for heading in page.headings] == [
        "Images to texts", "Texts to images", "Expressions", "Masked words", "Masked patches",
        "A true sentence", "The card of the checkpoint",
    ]  # fmt: skip
    assert "by the ITM head (this network has no entailment head)" in text
    assert all(source.startswith("data:image/") for source in page.sources)
    world = SceneWorld("easy", WORLD_SEED)
    for number, probe in enumerate(PROBES, 1):
        for item in probe_items(world, probe, 3 * number)[-3:]:
            for sentence in (item.caption, item.foil):
                assert any(re.fullmatch(rf"{re.escape(sentence)} \(\d\.\d\d\)", line) for line in page.texts)
    # the page follows the network: one that likes false sentences better is wrong everywhere
    model, liked = mamo.load("scenes_1h"), iter([0.25, 0.75])
    monkeypatch.setattr(model, "match", lambda _, texts: torch.full((len(texts),), next(liked)))
    monkeypatch.setattr(demo, "sample_pictures", lambda *_: [])
    write_demo(model, "wrong", tmp_path / "wrong.html")
    found = re.findall(
        r"<li(?: class=|><b class=)(hit|miss)>[^<]*(?:</b>)? \((0.[27]5)\)", (tmp_path / "wrong.html").read_text()
    )
    assert found == [("miss", "0.25"), ("miss", "0.75")] * 15
    assert "<b class=hit>" not in (tmp_path / "wrong.html").read_text()
    elsewhere = model.config.data.model_copy(update={"source": "pairs"})
    model.config = model.config.model_copy(update={"data": elsewhere})
    with pytest.raises(ValueError, match="was trained on pairs, and the demo draws pictures of the embedded world"):
        write_demo(model, "pairs", tmp_path / "pairs.html")


@pytest.mark.usefixtures("no_curves")
def test_an_entailment_head_is_used(pretrained: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """Bug: a network fine-tuned on entailment is asked for retrieval, or shown with labels of other sentences."""
    values = finetuning_values("entailment", output_dir=str(tmp_path / "entailment"), checkpoint=str(pretrained))
    train(finetune_config(write_config(tmp_path / "e.yaml", values), [], False), is_resume=False)
    main(["demo", f"checkpoint={tmp_path / 'entailment'}", "--to", str(tmp_path / "demo.html")])
    page = Page((tmp_path / "demo.html").read_text())
    assert [heading.partition(" that ")[0] for heading in page.headings] == ["Sentences", "The card of the checkpoint"]
    items = list(entailment_items(SceneWorld("easy", WORLD_SEED), "test", 3 * demo.ROWS))
    assert len(page.texts) > len(items)
    for item, shown in zip(items, page.texts):
        assert shown.startswith(f"{item.sentence}: ")
        assert item.label in shown  # as the label of the network, or as the true one
    values = finetuning_values("vqa", output_dir=str(tmp_path / "vqa"), checkpoint=str(pretrained))
    train(finetune_config(write_config(tmp_path / "v.yaml", values), [], False), is_resume=False)
    said = fails(lambda: main(["demo", f"checkpoint={tmp_path / 'vqa'}", "--to", str(tmp_path / "none.html")]))
    assert "has task vqa; the demo shows networks of pretrain, grounding and entailment" in said
    assert not (tmp_path / "none.html").exists()


def test_a_page_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Bug: the page is computed, and then there is a folder in its place."""
    (tmp_path / "folder.html").mkdir()
    for to in (tmp_path, tmp_path / "page", tmp_path / "folder.html"):
        arguments = ["demo", "checkpoint=x", "--to", str(to)]
        assert f"--to: {to} is the page to write" in fails(functools.partial(main, arguments))
