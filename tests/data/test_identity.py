"""Identities and units that the data do not bear out are said, in `validate` and before an evaluation."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamo.commands.data import main
from mamo.data import images
from mamo.data.images import BadSampleError, decode_image
from mamo.data.pairs_reader import write_json_lines
from mamo.evaluator import evaluate
from mamo.tasks.sources import pair_dataset
from mamo.trainer import train
from tests.tiny import TWO_STEPS, config_of

Rows = Callable[..., Path]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """`rows(name, [row, ...])` writes pairs with eight pictures next to them and returns the file."""
    (tmp_path / "images").mkdir()
    for k in range(8):
        Image.new("RGB", (16, 16), (30 * k, 0, 0)).save(tmp_path / f"images/{k}.png")

    def write(name: str, values: list[dict[str, Any]]) -> Path:
        write_json_lines(tmp_path / name, values)
        return tmp_path / name

    return write


def of_picture(k: int, **fields: Any) -> dict[str, Any]:
    return {"image": f"images/{k}.png", "caption": f"picture {k}", **fields}


def validated(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["validate", str(file)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shared", [7, "album", "", "007"])
def test_one_id_of_several_pictures_is_said(
    shared: object, rows: Rows, pretrained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Bug: pictures that share an image_id are one item of the gallery: every recall is 100, and no word."""
    file = rows("shared.jsonl", [of_picture(k, image_id=shared) for k in range(8)])
    said = f"1 of 1 image_ids belong to several pictures, which count as one: {str(shared)!r} of "
    assert said in validated(file, capsys)
    with caplog.at_level(logging.WARNING):
        entry = evaluate(pretrained, "pairs-zeroshot", [f"data.eval_file={file}"], tmp_path / "out")
    assert said in caplog.text
    assert (entry["facts"]["gallery_images"], entry["facts"]["chance/t2i_r1"]) == (1, 100.0)


def test_karpathy_ids_and_train_files_are_compared(rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: bare numbers of two data sets make different pictures one; a repeated cocoid does."""
    files = [rows(f"{name}.jsonl", [of_picture(k, image_id=k % 4) for k in part])
             for name, part in (("a", range(4)), ("b", range(4, 8)))]  # fmt: skip
    sentences = [{"raw": "a circle"}]
    listed = [{"filename": f"images/{k}.png", "split": "train", "cocoid": 5, "sentences": sentences} for k in range(2)]
    karpathy = files[0].parent / "k.json"
    karpathy.write_text(json.dumps({"images": listed}))
    for train_files, split, said in ((files, None, "4 of 4 image_ids"), ([karpathy], "train", "1 of 1 image_ids")):
        data = {"source": "pairs", "train_file": [str(file) for file in train_files], "train_split": split}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pair_dataset(config_of(data=data))
        assert f"data.train_file: {said} belong to several pictures" in caplog.text


def test_one_picture_of_several_ids_is_said(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a picture that has another id in each row is its own negative, and wrong for its own captions."""
    values = [of_picture(0, image_id=k) for k in range(3)] + [{**of_picture(1), "image": "./images/1.png"}]
    assert "1 pictures have several image_ids" in validated(rows("p.jsonl", values), capsys)


def test_sound_pairs_are_not_warned_of(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a warning for every file, which nobody reads."""
    values = [of_picture(k, image_id=k, caption=["one sentence", "word", "another one"]) for k in range(8)]
    values += [{**of_picture(0, image_id=0), "image": "images/../images/0.png", "caption": "a third row"}]
    values += [of_picture(1, image_id=1, caption=["红色的圆", "一个圆", "左边的圆"])]
    assert "warning" not in validated(rows("sound.jsonl", values), capsys)


@pytest.mark.parametrize("text", ["a red kite flies", "redkite"])
def test_a_sentence_in_pieces_is_said(text: str, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a caption that was split into words, or a word into letters, counts as so many captions."""
    pieces = text.split() if " " in text else [*text]
    values = [of_picture(k, caption=pieces) for k in range(8)]
    assert "8 of 8 lists of captions have only single words" in validated(rows("w.jsonl", values), capsys)


def test_texts_that_are_cut_are_said_in_training_and_evaluation(
    rows: Rows, pretrained: Path, tmp_path: Path, no_curves: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: captions longer than the text encoder's input are cut without a word, except by the API."""
    file = rows("cut.jsonl", [of_picture(k, caption="red circle " * (15 if k < 3 else 1)) for k in range(8)])
    with caplog.at_level(logging.WARNING):
        evaluate(pretrained, "pairs-zeroshot", [f"data.eval_file={file}"], tmp_path / "out")
    assert "1 of 2 texts are longer than data.text_max_tokens = 24 tokens, the longest has 32" in caplog.text
    caplog.clear()
    data = {"source": "pairs", "train_file": str(file), "text_max_tokens": 24}
    with caplog.at_level(logging.WARNING):
        train(config_of(data=data, training=TWO_STEPS, output_dir=str(tmp_path / "run")), is_resume=False)
    assert "3 of 8 texts are longer than data.text_max_tokens = 24 tokens, the longest has 32" in caplog.text
    assert caplog.text.count("text_max_tokens") == 1


@pytest.mark.parametrize("kind", ["TIFF", "PIL"])
@pytest.mark.parametrize("largest", [1, 255, 4095, 70_000, 2**31 - 1])
def test_32_bit_samples_are_refused(kind: str, largest: int) -> None:
    """Bug: an image of 32-bit integers becomes black, or white, without a word."""
    ramp = Image.fromarray(np.linspace(0, largest, 64).reshape(8, 8).astype(np.int32))
    out = io.BytesIO()
    ramp.save(out, "TIFF")
    with pytest.raises(BadSampleError, match="32-bit integer samples are not supported; save the image with 8 or 16"):
        decode_image(out.getvalue() if kind == "TIFF" else ramp)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_samples_keep_their_high_byte(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: 16-bit files are refused with the 32-bit ones; 12 bits in 16 are nearly black, without a word."""
    for largest, said in ((65_535, ""), (4_000, "no value above 4000 of 65,535 and becomes nearly black")):
        images._warn_of_dark.cache_clear()  # logged once a process
        ramp, out = np.linspace(0, largest, 64).reshape(8, 8).astype(np.uint16), io.BytesIO()
        if kind == "PPM":
            out.write(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
        else:
            Image.fromarray(ramp).save(out, kind)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert decode_image(out.getvalue()).max() == largest >> 8
        assert said in caplog.text
