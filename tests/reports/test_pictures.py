"""The report: one page that needs nothing else, with hits and misses where they are."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from mamo.config.schema import RunConfig
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.scorer import Scorer
from mamo.evaluator import evaluate
from mamo.reports import curves, pictures
from mamo.reports.compare import compare_runs
from mamo.reports.page import as_html, write_report
from mamo.tasks.pretrain.samples import sample_pictures
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import load_config
from mamo.trainer import train
from mamo.training.run_dir import dump
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import predictor_of, spread_weights


class Page(HTMLParser):
    """Collects images and headings, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.links: set[str | None] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)
            self.links |= {value for name, value in attrs if name == "href"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_a_run_and_an_evaluation_write_their_page(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a page that asks the network for something, unescaped text, pictures that do not decode, no curves."""
    few = {"enabled": True, "retrieval_items": 6, "probe_items": 4, "rerank_k": 2}
    train(tiny(training={"total_steps": 2, "warmup_steps": 1}, evaluation=few), is_resume=False)
    evaluate(tmp_path / "run", "scenes-easy-zeroshot", [f"evaluation.{k}={v}" for k, v in few.items()], pictures=8)
    for file in (tmp_path / "run/report.html", tmp_path / "run/evaluations/scenes-easy-zeroshot/report.html"):
        text = file.read_text()
        assert not re.search(r"https?://|<script|<link", text)
        page = Page(text)
        assert [re.split("[,:]", heading)[0] for heading in page.headings] == [
            "Numbers", "Images to texts", "Texts to images", "Expressions", "Masked words",
            "Masked patches", "Probes", "Losses and metrics", "Speed", "The card of the checkpoint",
        ]  # fmt: skip
        assert {f"#s{k}" for k in range(len(page.headings))} == page.links
        assert "share of a step spent waiting for data" in text
        for image in page.images:
            assert image["alt"]
            data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
            assert min(Image.open(io.BytesIO(data)).size) >= 16
        assert len(page.images) > pictures.SHOWN * (1 + pictures.TOP)


def test_pairs_have_pictures_of_their_own(tiny: Callable[..., RunConfig], predictor: Predictor, tmp_path: Path) -> None:
    """Bug: scenes shown for a run on files, nothing shown, or an end in an error where the file has few images."""
    for k in range(3):
        Image.fromarray(np.full((40, 30, 3), 80 * k, np.uint8)).save(tmp_path / f"{k}.png")
    rows = [{"image": f"{k}.png", "caption": f"{word} red circles"} for k, word in enumerate(("two", "three", "four"))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {key: str(tmp_path / "pairs.jsonl") for key in ("train_file", "eval_file")}
    config = tiny(data={"source": "pairs", **files}, losses={"mim_target": "pixels"})
    found = {re.split("[,:]", title)[0]: content for title, content in sample_pictures(predictor, config, 8)}
    assert list(found) == ["Images to texts", "Texts to images", "Masked words", "Masked patches"]
    for direction in ("Images to texts", "Texts to images"):
        assert len(re.findall('class="hit"', found[direction])) == 3
        assert len(re.findall('class="miss"', found[direction])) == 6
    for name, content in found.items():
        alts = [image["alt"] for image in Page(content).images]
        assert {str(alt).partition(" ")[2] for alt in alts} == {"red circles"}, name
    assert len(Page(found["Masked words"]).images) == 2 * 3


def test_large_pictures_are_kept_small() -> None:
    """Bug: a page of a hundred photographs at their full size, or photographs out of shape."""
    for shape, kept in (((264, 300), (300, 264)), ((400, 600), (396, 264))):
        (image,) = Page(pictures.img_tag(np.zeros((*shape, 3), np.uint8), "text")).images
        kind, data = re.findall(r"data:image/(\w+);base64,(.*)", str(image["src"]))[0]
        opened = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (opened.size, str(opened.format).lower()) == (kept, kind)


def test_hits_and_misses_are_marked() -> None:
    """Bug: the hit taken from the place in the list, texts and images exchanged, unescaped captions."""
    shown = [np.full((16, 16, 3), k, np.uint8) for k in range(4)]
    names = [f"<{k}>" for k in range(4)]
    best = [[2, 0, 1], [1, 3, 0]]
    rows = pictures._to_texts(best, shown, names).split('<div class="row">')[1:]
    found = [re.findall(r'<li class="(\w+)">&lt;(\d+)&gt;', row) for row in rows]
    assert found == [[("miss", "2"), ("hit", "0"), ("miss", "1")], [("hit", "1"), ("miss", "3"), ("miss", "0")]]
    rows = pictures._to_images(best, shown, names).split("<p>")[1:]
    found = [re.findall(r'class="(\w+)" height=\S+ loading=\S+ alt="&lt;(\d+)&gt;', row) for row in rows]
    assert [row[:4] for row in rows] == ["&lt;", "&lt;"]
    assert found == [[("miss", "2"), ("hit", "0"), ("miss", "1")], [("hit", "1"), ("miss", "3"), ("miss", "0")]]


@pytest.fixture
def predictor(tiny: Callable[..., RunConfig]) -> Predictor:
    """An untrained network of the tiny config, patches of 8 px in pictures of 16 x 16."""
    task = PretrainTask(tiny(losses={"mim_target": "pixels"}), scenes_tokenizer())
    return predictor_of(task.network.eval(), text_max_tokens=24)


@pytest.fixture
def scorer(predictor: Predictor) -> Scorer:
    return Scorer(predictor, batch_size=4)


def test_the_ranking_is_by_itm_within_the_shortlist_of_itc(scorer: Scorer) -> None:
    """Bug: ITC's order shown as ITM's, a text from beyond the shortlist, the two directions exchanged."""
    torch.manual_seed(0)
    spread_weights(scorer.network, least_ndim=2)
    n = 8
    captions = [
        f"a {colour} circle" for colour in ("red", "blue", "green", "white", "cyan", "pink", "purple", "yellow")
    ]
    with torch.inference_mode():
        images = scorer.encode_images([torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)])
        texts = scorer.encode_texts(*scorer.tokenize(captions))
        to_texts, to_images, by = pictures._rankings(scorer, images, captions, rerank_k=6)
        rows = torch.cartesian_prod(torch.arange(n), torch.arange(n))
        itm = scorer.itm_scores(images, texts, rows[:, 0], rows[:, 1]).view(n, n)
        itc = images.feature @ texts.feature.T
    assert by.startswith("ITM")
    for found, first, then in ((to_texts, itc, itm), (to_images, itc.T, itm.T)):
        for k in range(n):
            short = sorted(range(n), key=lambda j: -float(first[k, j]))[:6]
            assert found[k] == sorted(short, key=lambda j: -float(then[k, j]))[: pictures.TOP]


def test_a_perfect_prediction_rebuilds_the_picture(scorer: Scorer) -> None:
    """Bug: predictions put into other slots, patches transposed, a picture that is rebuilt from itself."""
    torch.manual_seed(1)
    once = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    batch = torch.cat([once, once])  # each picture has its twin to be rebuilt from
    masked = torch.tensor([[0, 3], [1, 2], [2, 3]] * 2)
    visible = torch.tensor([[1, 2], [0, 3], [0, 1]] * 2)
    pixels = scorer.network.backbone.image_encoder.normalize(batch)
    corner = {0: (0, 0), 1: (0, 8), 2: (8, 0), 3: (8, 8)}
    wanted = torch.stack([
        torch.stack([image[:, y : y + 8, x : x + 8].flatten() for y, x in map(corner.__getitem__, row)])
        for image, row in zip(pixels, masked.tolist())
    ])  # fmt: skip

    class Oracle(torch.nn.Module):
        calls = 0

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return wanted[4 * (self.calls - 1) :][: len(tokens)] * 3

    scorer.network.mim = Oracle()  # type: ignore[assignment]
    with torch.inference_mode():
        rebuilt = pictures.rebuilt_pictures(scorer, batch, ["a red circle"] * 6, visible, masked, "pixels")
    for picture, original in zip(rebuilt, batch):
        assert np.array_equal(picture, original.permute(1, 2, 0).numpy())
    wanted = wanted.flip(0)  # predictions of other pictures: only the seen patches stay
    scorer.network.mim.calls = 0
    with torch.inference_mode():
        rebuilt = pictures.rebuilt_pictures(scorer, batch, ["a red circle"] * 6, visible, masked, "pixels")
    assert np.array_equal(rebuilt[0][:8, 8:], batch[0, :, :8, 8:].permute(1, 2, 0).numpy())
    assert not np.array_equal(rebuilt[0][:8, :8], batch[0, :, :8, :8].permute(1, 2, 0).numpy())


def test_hidden_patches_are_grey() -> None:
    """Bug: columns before rows, or what is seen hidden."""
    shown = pictures.mask_patches(np.full((4, 6, 3), 7, np.uint8), torch.tensor([1, 5]), (2, 3))
    assert (shown[0] == 128).all(axis=1).tolist() == [False, False, True, True, False, False]
    assert (shown[3] == 128).all(axis=1).tolist() == [False, False, False, False, True, True]


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


def test_probes_have_bars_and_the_card_is_html(tmp_path: Path) -> None:
    """Bug: a bar of another length than the number, a table of the card left as text."""
    text = write_report(tmp_path, "t", {"probe/count_change/itm": 61.25, "itc/rsum": 3.0}, []).read_text()
    assert '<td>count change</td><td>ITM</td><td><div class=bar><i style="width:61.2%"></i>' in text
    assert text.count("class=bar><i") == 1
    shown = as_html("# a <b>\n\n| | |\n|---|---|\n| seed | `7` |\n\n- one\n- two\n\nplain")
    assert shown == (
        "<h3>a &lt;b&gt;</h3><table><tr><td>seed</td><td><code>7</code></td></tr></table>"
        "<ul><li>one</li><li>two</li></ul><p>plain</p>"
    )


def test_the_evaluations_of_a_run_are_drawn_against_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: no curve, values at another step, numbers of two protocols in one line, sums that flatten the rest."""
    figures: list[Any] = []
    save = Figure.savefig

    def watched(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)

    def entry(step: int, protocol: str, first: float, **more: float) -> dict[str, Any]:
        metrics = {"itc/i2t_r1": first, "itc/rsum": 500.0, "probe/swap/itc": 50.0 + first, "probe/swap/itm": 60.0}
        return {"step": step, "protocol": protocol, "metrics": {**metrics, **more}}

    def page(*entries: dict[str, Any]) -> str:
        (tmp_path / "results.json").write_text(json.dumps({"evaluations": entries}))
        return write_report(tmp_path, "t", {}, [], tmp_path / "checkpoints/step-0000009", "# a card").read_text()

    assert '<img class="curves"' not in page()
    assert '<img class="curves"' not in page(entry(5, "another", 1.0), entry(9, "own", 7.0))
    assert not figures
    text = page(entry(3, "another", 1.0), entry(6, "own", 5.0), entry(9, "own", 7.0, **{"vqa/accuracy": 3.0}))
    assert text.count('<img class="curves" alt="Evaluations against the step" src="data:image/png;base64,iVBOR') == 1
    assert ">Evaluations</a>" in text
    (figure,) = figures
    itc, probe, vqa, empty = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["itc", "probe", "vqa", ""]
    (recall,) = itc.lines
    assert (recall.get_xdata().tolist(), recall.get_ydata().tolist()) == ([6, 9], [5.0, 7.0])
    by_itc, by_itm = probe.lines
    assert by_itc.get_color() == by_itm.get_color()
    assert by_itc.get_linestyle() != by_itm.get_linestyle()
    assert [told.get_text() for told in probe.get_legend().get_texts()] == ["swap/itm", "swap/itc"]  # 60 above 57
    assert np.isnan(vqa.lines[0].get_ydata()[0])
    assert not empty.axison


def test_the_green_band_is_the_one_that_runs_are_compared_with(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: curves.png shows another band, or another line in it, than `compare_runs` judges a run by."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: figures.append(figure))
    monkeypatch.setattr(curves, "CLONE", tmp_path)
    run, reference = tmp_path / "run", tmp_path / "configs/reference/recipe"
    for folder, seed, late in ((run, 1, 1.6), (reference, 0, 1.0), (reference / "another_seed", 2, 1.0)):
        folder.mkdir(parents=True)
        dump(tiny(), folder / "config.yaml")
        noise = np.random.default_rng(seed).normal(0, 0.03, (120, 2))
        rows = [
            {
                "step": step,
                "loss/mlm": 5 * np.exp(-step / 90 + noise[step - 1, 0]) * (late if step > 70 else 1),
                "loss/itm": 0.6 * np.exp(noise[step - 1, 1]),
                "mlm_accuracy": 0.0,
                "learning_rate": 1e-3,
            }
            for step in range(1, 121)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves.plot_curves(run, load_config)
    (figure,) = figures
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert [name for name, axis in panels.items() if axis.collections] == ["loss/mlm", "loss/itm", "learning_rate"]
    (deviation,) = compare_runs(run, reference).deviations
    assert deviation.metric == "loss/mlm"
    outline = panels["loss/mlm"].collections[0].get_paths()[0].vertices
    at_step = {round(y, 9) for x, y in outline if x == deviation.step}
    assert at_step == {round(deviation.low, 9), round(deviation.high, 9)}
    smooth = panels["loss/mlm"].lines[1]
    assert dict(zip(smooth.get_xdata(), smooth.get_ydata()))[deviation.step] == pytest.approx(deviation.value)


def test_the_band_of_the_run_of_the_same_config_is_drawn(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a band for the folder's name alone, for another recipe; none for another seed, device, folder or version."""

    def green(folder: str, **over: Any) -> int:
        """Pixels of the band in the picture of a run in this folder."""
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text('{"step": 1, "loss/a": 1}\n{"step": 2, "loss/a": 2}\n')
        dump(tiny(output_dir=folder, **over), tmp_path / folder / "config.yaml")
        curves.plot_curves(tmp_path / folder, load_config)
        image = np.asarray(Image.open(tmp_path / folder / "curves.png").convert("RGB")).astype(int)
        return int(((image[..., 1] - image[..., 0] > 20) & (image[..., 1] - image[..., 2] > 20)).sum())

    monkeypatch.setattr(curves, "CLONE", tmp_path / "clone")
    reference = tmp_path / "clone/configs/reference/recipe"
    reference.mkdir(parents=True)
    rows = "".join(f'{{"step": {k}, "loss/a": {k % 2}}}\n' for k in range(1, 120))
    (reference / "metrics.jsonl").write_text(rows)
    dump(tiny(), reference / "config.yaml")
    older = yaml.safe_load((reference / "config.yaml").read_text())
    assert older["losses"].pop("mim_target")  # from before there was such a key
    (reference / "config.yaml").write_text(yaml.safe_dump(older))
    free: dict[str, Any] = {"data": {"workers": 2}, "seed": 8, "evaluation": {"every_steps": 7, "rerank_k": 3}}
    free["training"] = {"checkpoint_every_steps": 3, "device": "auto", "micro_batch_size": 4}
    assert green("far/away", **free) > 100
    assert green("recipe", training={"learning_rate": 1e-3}) == 0
    assert green("other", masking={"image_ratio": 0.5}) == 0
    (tmp_path / "clone").rename(tmp_path / "work")
    assert green("again") == 0
    monkeypatch.chdir(tmp_path / "work")
    assert green("here") > 100
    (reference.relative_to(tmp_path / "clone") / "config.yaml").write_text("gone: 1\n")
    assert green("unknown") == 0


def test_the_recipes_of_the_references_find_them(tmp_path: Path) -> None:
    """Bug: a reference that no run can match any more, since its config and the recipe's went apart."""
    root = Path(__file__).parents[2]
    for name in ("scenes", "scenes_1h"):
        overrides = ["output_dir=x", "seed=5", "training.precision=bf16"]  # the precision is measured at a run's start
        dump(load_config(root / f"configs/pretrain/{name}.yaml", overrides), tmp_path / "config.yaml")
        found = curves.reference_of(tmp_path, load_config)
        assert found is not None, name
        assert found.name == name


@pytest.mark.slow
def test_a_browser_shows_two_hundred_rows(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a page that a browser cannot lay out: rows that overlap, pictures that do not decode, too wide."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    few = {"enabled": True, "retrieval_items": 6, "probe_items": 4, "rerank_k": 2}
    train(tiny(training={"total_steps": 2, "warmup_steps": 1}, evaluation=few), is_resume=False)
    settings = [f"evaluation.{key}={value}" for key, value in few.items()]
    evaluate(tmp_path / "run", "scenes-easy-zeroshot", settings, tmp_path / "shown", pictures=200)
    page = tmp_path / "shown/report.html"
    assert page.stat().st_size < 30e6
    measure = """<script>addEventListener("load", () => {
      const all = [...document.images], rows = [...document.querySelectorAll("section > .row")]
      const boxes = rows.map(row => row.getBoundingClientRect())
      const apart = boxes.filter((box, k) => k === 0 || box.top >= boxes[k - 1].bottom)
      document.title = [all.length, all.filter(image => image.naturalWidth).length,
        document.documentElement.scrollWidth, rows.length, apart.length].join() })</script>"""
    eager = page.read_text().replace(' loading="lazy"', "").replace("</body>", measure + "</body>")
    (tmp_path / "measured.html").write_text(eager)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", f"--user-data-dir={tmp_path}/b"]
    dumped = subprocess.run(
        [browser, *flags, "--dump-dom", f"file://{tmp_path}/measured.html"], capture_output=True, text=True, timeout=300
    )
    (title,) = re.findall(r"<title>([\d,]+)</title>", dumped.stdout)
    n_images, n_shown, width, rows, apart = map(int, title.split(","))
    assert n_images == n_shown > 200 * (1 + pictures.TOP)
    assert width <= 1200
    assert rows == apart > 400
    picture = tmp_path / "shown.png"
    subprocess.run([browser, *flags, f"--screenshot={picture}", f"file://{page}"], capture_output=True, timeout=300)
    assert len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)) > 500
