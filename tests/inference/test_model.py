"""The library as a researcher imports it: `mamo.load` and what its model does."""

import hashlib
import itertools
import json
import logging
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import mamo
from mamo.config.schema import RunConfig
from mamo.config.shipped import find_config
from mamo.data.records import GroundingRecord
from mamo.evaluation.metrics.grounding import best_proposal, grounding_scores
from mamo.evaluation.probes import fill_masked_words
from mamo.evaluator import evaluate
from mamo.tasks.grounding.evaluate import RESIZE, ground_records
from mamo.tasks.registry import finetune_config
from mamo.tasks.sources import load_records
from mamo.trainer import train
from mamo.world.captions import identifying_caption
from mamo.world.masked_words import masked_word_items
from mamo.world.rendering import render
from mamo.world.scene import WORLD_SEED, SceneWorld
from tests.tiny import spread_weights, values_of

N = 12
WORLD = SceneWorld("easy", WORLD_SEED)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(render(WORLD.scene("test", k), (16, 16))) for k in range(N)]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [identifying_caption(WORLD.scene("test", k)).text for k in range(N)]


@pytest.fixture
def run(tiny: Callable[..., RunConfig], tmp_path: Path, no_curves: None) -> Path:
    """A run of two steps."""
    train(tiny(training={"total_steps": 2, "warmup_steps": 1}, data={"text_max_tokens": 40}), is_resume=False)
    return tmp_path / "run"


def stir(model: mamo.Model) -> mamo.Model:
    """Larger random weights: a network of two steps says nearly the same of everything."""
    torch.manual_seed(0)
    spread_weights(model.network, least_ndim=2)
    return model


def test_recall_equals_the_evaluators(run: Path, pictures: list[Image.Image], captions: list[str]) -> None:
    """Bug: another shortlist, other pixels or another score in the library than in the published numbers."""
    overrides = [f"evaluation.retrieval_items={N}", "evaluation.probe_items=2", "evaluation.rerank_k=4"]
    metrics = evaluate(run, "scenes-easy-zeroshot", overrides)["metrics"]
    model = mamo.load(run)
    assert len(set(captions)) == N
    for gallery, queries, direction in (
        (model.index(pictures), captions, "t2i"),
        (model.index_texts(captions), pictures, "i2t"),
    ):
        found = gallery.retrieve(queries, k=4, rerank_k=4)
        assert len(gallery) == N
        recall = 100 * sum(best[0][0] == k for k, best in enumerate(found)) / N
        assert recall == pytest.approx(metrics[f"rerank/{direction}_r1"])
        assert all(a >= b for best in found for (_, a), (_, b) in itertools.pairwise(best))


def test_images_in_every_form_are_the_same(run: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    """Bug: a tensor that is normalised twice, a path that is resized in another way, a batch that mixes images up."""
    model = stir(mamo.load(run))
    large = pictures[0].resize((40, 28))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, as phones write it
    large.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    tensor = torch.from_numpy(mamo.inference.model.np.array(large)).permute(2, 0, 1)
    opened = Image.open(tmp_path / "a.png")
    assert opened.size == (28, 40)
    features = model.encode_image([large, tmp_path / "a.png", str(tmp_path / "a.png"), tensor, opened, pictures[1]])
    torch.testing.assert_close(features[:1].expand(5, -1), features[:5])
    assert not torch.allclose(features[0], features[5], atol=1e-2)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(model.encode_image([pictures[1]])[0], features[5])
    assert opened.size == (28, 40)  # the caller's picture stays as it was


def test_texts_are_read_as_in_training(run: Path) -> None:
    """Bug: full-width letters, odd spaces or a lone surrogate, which training cleans, are other words or an error."""
    model = stir(mamo.load(run))
    odd = ["ａ ｒｅｄ\u2003circle ", "a red circle", "a red circle\ud800"]
    features = model.encode_text(odd)
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[1], features[2])
    picture = Image.new("RGB", (16, 16), "red")
    assert model.fill_mask(picture, "ａ ｒｅｄ [MASK]") == model.fill_mask(picture, "a red [MASK]")


def test_match_similarity_and_words(run: Path, pictures: list[Image.Image], captions: list[str]) -> None:
    """Bug: probabilities of the mismatch, a transposed matrix, [MASK] read as plain text, another slot filled."""
    model = stir(mamo.load(run))
    scorer = model._scorer
    similarity = model.similarity(pictures[:3], captions[:2])
    assert similarity.shape == (3, 2)
    assert float(similarity[2, 1]) == pytest.approx(
        float(model.encode_image(pictures[2:3])[0] @ model.encode_text(captions[1:2])[0]), abs=1e-6
    )
    with torch.inference_mode():
        images = scorer.encode_images([torch.stack([model.processor.pixels(picture) for picture in pictures])])
        rows = torch.arange(N)
        logits = scorer.itm_scores(images, scorer.encode_texts(*scorer.tokenize(captions)), rows, rows)
        items = [item for item in masked_word_items(WORLD, N) if item.word_class == "colour"][:6]
        expected = fill_masked_words(scorer, images, items, {k: k for k in range(N)})
    probability = model.match(pictures, captions)
    torch.testing.assert_close(probability, 1 / (1 + (-logits).exp()))
    for item, word, _ in expected:
        before, after = item.caption[: item.start], item.caption[item.end :]
        filled = model.fill_mask(pictures[item.scene_index], f"{before}[MASK]{after}")
        said = model.processor.tokenizer.decode(
            model.processor.tokenizer(before, add_special_tokens=False)["input_ids"]
        )
        assert filled[len(said) :].strip().startswith(word)


def test_grounding_has_the_size_of_the_image(run: Path, pictures: list[Image.Image]) -> None:
    """Bug: heat in patches or in the network's size, axes exchanged."""
    found = stir(mamo.load(run)).ground(pictures[0].resize((50, 30)), "a red circle")
    assert found.heat.shape == (30, 50)
    assert found.heat[found.point[1], found.point[0]] == found.heat.max() > 0
    x, y, width, height = found.box
    assert (x % 25, y % 15, width % 25, height % 15) == (0, 0, 0, 0)  # whole patches of the 2 x 2
    assert x <= found.point[0] < x + width
    assert y <= found.point[1] < y + height


@pytest.mark.parametrize("heat_from", ["fusion", "image_encoder", "occlusion"])
def test_grounding_is_the_evaluators(
    run: Path, heat_from: Literal["fusion", "image_encoder", "occlusion"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the heat of another place than the evaluation reads, or the choice of it left unread."""
    model = stir(mamo.load(run))
    records, load_image = load_records(model.config.data, GroundingRecord, "test", 6)
    chosen: list[tuple[float, ...]] = []

    def kept(heat: Any, proposals: Any, gold: Any) -> dict[str, float]:
        chosen.append(tuple(proposals[best_proposal(heat, proposals)]))
        return grounding_scores(heat, proposals, gold)

    monkeypatch.setattr("mamo.tasks.grounding.evaluate.grounding_scores", kept)
    with torch.inference_mode():
        ground_records(model._scorer, records, load_image, (16, 16), 4, heat_from)
    settings = model.config.evaluation.model_copy(update={"grounding_heat": heat_from})
    model.config = model.config.model_copy(update={"evaluation": settings})
    ordered = sorted(records, key=lambda record: record.image)
    calls = [model.ground(load_image(r.image), r.expression, r.proposals_xywh) for r in ordered]
    assert [tuple(found.box) for found in calls] == chosen
    other = model.ground(load_image(ordered[0].image), ordered[0].expression, heat_from="occlusion")
    assert (heat_from == "occlusion") == bool((other.heat == calls[0].heat).all())


@pytest.mark.parametrize("resize", ["cut", "uncut"])
def test_heat_of_records_is_resized_as_in_the_evaluation(
    run: Path, pictures: list[Image.Image], resize: Literal["cut", "uncut"]
) -> None:
    """Bug: a model of files finds another box or heat than its evaluation, whose heat is bicubic."""
    model = stir(mamo.load(run))
    data = model.config.data.model_copy(update={"source": "records"})
    settings = model.config.evaluation.model_copy(update={"heat_resize": resize})
    model.config = model.config.model_copy(update={"data": data, "evaluation": settings})
    picture, patches = pictures[0].resize((50, 30)), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    with patch("mamo.inference.model.heatmaps", return_value=patches[None]):
        found = model.ground(picture, "a red circle")
    assert (found.heat == RESIZE[resize](patches, (30, 50))).all()
    assert (found.heat.min() < 0) == (resize == "uncut")


def test_the_box_holds_what_is_connected_to_the_hottest_patch() -> None:
    """Bug: a second hot region drawn in, diagonal neighbours lost, axes exchanged, patches taken for pixels."""
    heat = torch.zeros(4, 6)
    heat[1, 2], heat[2, 3], heat[2, 4], heat[0, 0], heat[3, 5] = 1.0, 0.6, 0.5, 0.9, 0.4
    assert mamo.inference.model._hot_box(heat, (40, 120)) == (40.0, 10.0, 60.0, 20.0)


def test_heads_that_are_missing_are_named(tiny: Callable[..., RunConfig], tmp_path: Path, no_curves: None) -> None:
    """Bug: an attribute error on None."""
    only = {"itc": 0.0, "itm": 0.0, "mim": 0.0, "mrm_image": 0.0, "mrm_text": 0.0}
    train(tiny(training={"total_steps": 1, "warmup_steps": 0}, losses={"weights": only}), is_resume=False)
    model = mamo.load(tmp_path / "run")
    picture = Image.new("RGB", (16, 16))
    for call in (
        lambda: model.encode_image([picture]),
        lambda: model.match([picture], ["x"]),
        lambda: model.index([picture]),
        lambda: model.index_texts(["x"]),
        lambda: model.ground(picture, "x"),
    ):
        with pytest.raises(mamo.MissingHeadError, match=r"trained without it[cm]; fine-tune it with `mamo finetune"):
            call()
    assert model.fill_mask(picture, "a [MASK]")
    model.network.mlm = None
    for call, head in (
        (lambda: model.fill_mask(picture, "a [MASK]"), "mlm"),
        (lambda: model.match([picture], ["x"]), "itm"),
    ):
        with pytest.raises(mamo.MissingHeadError) as caught:
            call()
        command = re.findall(r"`mamo finetune --config (\S+) checkpoint=FOLDER (\S+)`", str(caught.value))
        ((name, override),) = command
        config = finetune_config(find_config(name, "finetune"), [f"checkpoint={tmp_path / 'run'}", override], False)
        assert getattr(config.losses.weights, head) > 0  # the command does train what is missing


def test_bad_input_is_told(run: Path, pictures: list[Image.Image], tmp_path: Path, caplog: Any) -> None:
    """Bug: a traceback from the depths, an empty answer, texts that are cut in silence or announced each time."""
    model = mamo.load(run)
    (tmp_path / "text.png").write_text("no image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for call, kind, message in (
        (lambda: model.encode_image([tmp_path / "text.png"]), mamo.BadSampleError, r"text\.png: not an image"),
        (lambda: model.encode_image([tmp_path / "absent.png"]), mamo.BadSampleError, r"absent\.png"),
        (
            lambda: model.encode_image([torch.zeros(3, 4, 4, dtype=torch.int64)]),
            mamo.BadSampleError,
            r"uint8, or float from 0 to 1, not int64 \[3, 4, 4\]",
        ),
        (lambda: model.encode_image([None]), mamo.BadSampleError, "not NoneType"),  # type: ignore[list-item]
        (lambda: model.encode_image("absent.png"), mamo.BadSampleError, "absent.png"),
        (lambda: model.encode_image([]), ValueError, "a list of images"),
        (lambda: model.index([]), mamo.EmptyGalleryError, "the gallery is empty"),
        (lambda: model.index_texts([]), mamo.EmptyGalleryError, "index_texts: the gallery is empty"),
        (lambda: model.index_texts("red circle"), ValueError, "a list of texts, not 'red circle'"),
        (lambda: model.index_texts(["x"]).retrieve(pictures, k=9, rerank_k=4), ValueError, "k = 9 must"),
        (lambda: model.index_texts(["x"]).retrieve([tmp_path / "absent.png"]), mamo.BadSampleError, r"absent\.png"),
        (lambda: model.match(pictures[:2], ["x"]), ValueError, "2 images and 1 texts"),
        (lambda: model.encode_text("a text"), ValueError, "a list of texts"),
        (lambda: model.encode_text([]), ValueError, "a list of texts"),
        (lambda: model.fill_mask(pictures[0], "no mask"), ValueError, r"no \[MASK\] among the first 40 tokens"),
        (lambda: model.index(pictures).retrieve(["x"], k=9, rerank_k=4), ValueError, "k = 9 must.*increase rerank_k"),
        (lambda: model.index(pictures).retrieve(["x"], k=0), ValueError, "k = 0 must be at least 1"),
        (lambda: model.match(pictures[:1], "red circle"), ValueError, "a list of texts, not 'red circle'"),
        (lambda: model.encode_text([3]), ValueError, r"a list of texts, not \[3\]"),  # type: ignore[list-item]
        (
            lambda: model.encode_image([torch.zeros(3, 0, 4, dtype=torch.uint8)]),
            mamo.BadSampleError,
            r"not .*\[3, 0, 4\]",
        ),
        (lambda: model.encode_image([Image.open(tmp_path / "cut.png")]), mamo.BadSampleError, r"cut\.png"),
        (lambda: mamo.load(run, precision="int8"), ValueError, "'int8' is not valid"),  # type: ignore[arg-type]
    ):
        with pytest.raises(kind, match=message):
            call()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.encode_text(["red " * 100])
    assert caplog.text.count("texts are cut to 40 tokens; the longest has 102") == 1
    caplog.clear()
    mamo.load(run).fill_mask(pictures[0], "[MASK] " + "red " * 100)
    assert caplog.text.count("texts are cut to 40 tokens; the longest has 103") == 1


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_checkpoints_that_must_not_load(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a truncated file that loads in part, a pickle whose code runs."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mamo.CheckpointError, match="no such folder; give a run"):
        mamo.load(tmp_path / "nowhere")
    with pytest.raises(mamo.CheckpointError, match=rf"Did you mean {tmp_path / 'run'}\?"):
        mamo.load(tmp_path / "rum")
    (tmp_path / "x/run").mkdir(parents=True)
    with pytest.raises(mamo.CheckpointError, match=r"Did you mean x/run\?"):  # and the hub is not asked for it
        mamo.load("x/runn")
    (tmp_path / "ALBEF.pth").touch()
    with pytest.raises(mamo.CheckpointError, match="To start a run from ALBEF's"):
        mamo.load(tmp_path / "ALBEF.pth")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(mamo.CheckpointError, match="not a complete checkpoint"):
        mamo.load(tmp_path / "foreign")
    folder = (run / "checkpoints/last").resolve()
    file, manifest = folder / "student.safetensors", json.loads((folder / "manifest.json").read_text())
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(mamo.CheckpointError, match=r"damaged checkpoint, student\.safetensors has"):
        mamo.load(run)
    evil = pickle.dumps(Evil())
    file.write_bytes(evil)
    manifest["student.safetensors"] = {"bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(mamo.CheckpointError, match=r"student\.safetensors cannot be read"):
        mamo.load(run)
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(run: Path) -> None:
    """Bug: a late error from CUDA."""
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(mamo.DeviceError, match="has no GPU"):
            mamo.load(run, device=device)
    for device, message in (("gpu", "use auto, cpu"), ("meta", "not supported"), (None, "use auto")):
        with pytest.raises(mamo.DeviceError, match=message):
            mamo.load(run, device=device)  # type: ignore[arg-type]


def in_threads(work: Callable[[int], object], n_threads: int = 8) -> list[object]:
    """Run `work(thread)` ten times in each thread, all at once; return what failed."""
    begin, failed = threading.Barrier(n_threads), list[object]()

    def run_ten(number: int) -> None:
        begin.wait()
        for _ in range(10):
            try:
                if not work(number):
                    failed.append("wrong")
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=run_ten, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_texts_from_threads_are_the_same(run: Path) -> None:
    """Bug: the tokenizer's padding and truncation are state that threads share: wrong features, or a ValueError."""
    model = mamo.load(run)
    batches = [["red circle " * (1 + (j * i) % 40) for j in range(30)] for i in range(8)]
    wanted = [model.encode_text(batch) for batch in batches]
    assert in_threads(lambda i: torch.allclose(model.encode_text(batches[i]), wanted[i], atol=1e-5)) == []


def test_everything_else_from_threads_is_the_same(run: Path, pictures: list[Image.Image]) -> None:
    """Bug: Grad-CAM of the image encoder records the attention of other threads, or switches theirs."""
    model = stir(mamo.load(run))
    texts = ["a red circle", "two small blue squares and a green star"] * 2
    wanted = [
        model.ground(pictures[i], texts[i % 4], heat_from="image_encoder").heat
        if i % 2
        else (model.match(pictures[i : i + 4], texts), model.fill_mask(pictures[i], f"[MASK] {texts[i % 4]}"))
        for i in range(8)
    ]

    def ask(i: int) -> bool:
        if i % 2:
            found = model.ground(pictures[i], texts[i % 4], heat_from="image_encoder").heat
            return bool(np.array_equal(found, wanted[i]))
        filled = model.fill_mask(pictures[i], f"[MASK] {texts[i % 4]}")
        return torch.equal(model.match(pictures[i : i + 4], texts), wanted[i][0]) and filled == wanted[i][1]

    assert in_threads(ask) == []


def test_proposals_in_every_form(run: Path, pictures: list[Image.Image]) -> None:
    """Bug: an array of proposals is "truth value ambiguous"; a box of another form ends in a traceback."""
    model = stir(mamo.load(run))
    boxes = [(0, 0, 5, 16), (5, 0, 11, 16)]
    box = model.ground(pictures[0], "a circle", boxes).box
    for same in (
        np.array(boxes),
        torch.tensor(boxes),
        [np.array(one) for one in boxes],
        tuple(boxes),
        np.array(boxes) / 1,
    ):
        found = model.ground(pictures[0], "a circle", same)
        assert found.box == box
        assert type(found.box) is tuple
    for none in ((), [], np.zeros((0, 4)), torch.zeros(0, 4)):
        assert len(model.ground(pictures[0], "a circle", none).box) == 4
    for wrong in (
        (0, 0, 5, 5),
        [(0, 0, 5)],
        [(0, 0, 5, float("nan"))],
        [(0, 0, float("inf"), 5)],
        ["0055"],
        [None],
        {"a": (0, 0, 5, 5)},
        "0 0 5 5",
        None,
        np.zeros(4),
        np.zeros((1, 2, 4)),
        [(0, 0, "5", 5)],
    ):
        with pytest.raises(ValueError, match=r"ground: proposal"):
            model.ground(pictures[0], "a circle", wrong)


def test_invalid_arguments_name_what_is_valid(run: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    """Bug: a mistyped method is taken for another one, or an argument of another type ends in a traceback."""
    model = mamo.load(run)
    gallery = model.index(pictures)
    for call, message in (
        (
            lambda: model.ground(pictures[0], "x", heat_from="fuzion"),
            "'fuzion' is not valid; use fusion, image_encoder",
        ),
        (lambda: model.ground(pictures[0], "x", heat_from=3), "heat_from 3 is not valid"),
        (lambda: model.ground(pictures[0], None), r"give a list of texts, not \[None\]"),
        (lambda: model.fill_mask(pictures[0], None), "fill_mask: give one text, not None"),
        (lambda: model.fill_mask(pictures[0], ["a [MASK]"]), "fill_mask: give one text, not"),
        (lambda: model.fill_mask(pictures[0], b"a [MASK]"), "fill_mask: give one text, not"),
        (lambda: model.encode_text({"a": "b"}), "give a list of texts, not {'a': 'b'}"),
        (lambda: model.encode_text(b"abc"), "give a list of texts"),
        (lambda: model.encode_text(None), "give a list of texts, not None"),
        (lambda: model.encode_text(text for text in "ab"), "give a list of texts"),
        (lambda: model.encode_text({"a", "b"}), "give a list of texts"),
        (lambda: model.encode_image({"a": pictures[0]}), "give a list of images"),
        (lambda: model.encode_image([Image.new("RGB", (0, 0))]), "an image must have pixels, not 0 x 0"),
        (lambda: model.encode_image([Image.new("L", (3, 0))]), "an image must have pixels, not 3 x 0"),
        (lambda: gallery.retrieve(["x"], k=2.5), "k must be a whole number, not 2.5"),
        (lambda: gallery.retrieve(["x"], k=True), "k must be a whole number, not True"),
        (lambda: gallery.retrieve(["x"], k="2"), "k must be a whole number, not '2'"),
        (lambda: gallery.retrieve(["x"], rerank_k=8.0), "rerank_k must be a whole number, not 8.0"),
        (lambda: mamo.load(None), "give the path of a run, .* not None"),
        (lambda: mamo.load(3), "give the path of a run, .* not 3"),
        (lambda: mamo.load(run, device=None), "device None"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert len(str(caught.value)) < 400
    assert len(gallery.retrieve(["x"], k=np.int64(2))[0]) == 2


def test_reasoning_reads_the_images_that_it_was_trained_on(
    tiny_file: Callable[..., Path], pictures: list[Image.Image]
) -> None:
    """Bug: one picture a sentence, or three, of a model of pairs: an answer to another question, or a traceback."""
    model = mamo.Model.from_task(mamo.build(values_of("reasoning")))
    assert model.reason([pictures[:2]], ["both images show a circle"]).shape == (1,)
    for images, message in (
        ([pictures[:1]], "1 images per sentence; this model reads 2"),
        ([pictures[:3]], "3 images per sentence; this model reads 2"),
        ([pictures[:2], pictures[:1]], "all of the same length"),
        (pictures[:1], "give a list of images for each sentence"),
        (["ab"], "give a list of images for each sentence"),
        ([{"left": pictures[0], "right": pictures[1]}], "give a list of images for each sentence"),
        ([[]], "give a list of images for each sentence"),
        ({"a": pictures[:2]}, "give a list of lists of images"),
        ([], "give a list of lists of images"),
        (None, "give a list of lists of images"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reason(images, ["x"] * (2 if images == [pictures[:2], pictures[:1]] else 1))


def test_a_model_is_saved_into_a_folder_of_its_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a model saved into its run's folder is what `mamo.load` reads from then on; a file or a full disk ends in a
    traceback of a library."""
    model = mamo.load(run)
    step = run / "checkpoints" / "step-0000002"
    (tmp_path / "file").write_text("mine")
    for folder in (run, step, run / "checkpoints" / "last"):
        with pytest.raises(ValueError, match="is the folder of a run or checkpoint; name another folder"):
            model.save_pretrained(folder)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"save_pretrained: .*file.* cannot be written"):
            model.save_pretrained(folder)
    assert not (run / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "new")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mamo.inference.hf_export.save_file", full)
    with pytest.raises(ValueError, match="cannot be written: the disk may be full"):
        model.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "vocab.txt", "tokenizer.json"])
def test_the_users_files_are_not_overwritten(run: Path, tmp_path: Path, name: str) -> None:
    """Bug: `save_pretrained` makes a step that breaks `--resume`, or replaces the README.md of a project."""
    model = mamo.load(run)
    for folder in ("checkpoints/step-9", "checkpoints/step-0000002/below"):
        with pytest.raises(ValueError, match="is the folder of a run or checkpoint; name another folder"):
            model.save_pretrained(run / folder)
        assert not (run / folder).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"^save_pretrained: .*mine/{name} is not of an earlier export"):
        model.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_text() == "{}"
