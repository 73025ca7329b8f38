"""The four layouts of image-caption pairs, and the messages for what is wrong in them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamo.data.pair_record import PairRecord
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import MAX_CAPTION_CHARS, clean_caption, read_lines, read_pairs
from mamo.data.validate import check_pairs, validate_pairs

CAPTIONS = {"a": ["a red kite", "someone flies a kite"], "b": ["two cups"], "c": ["Grüße, 東京"]}


def png(name: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(ord(name)).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in CAPTIONS:
        (tmp_path / "images" / f"{name}.png").write_bytes(png(name))
    return tmp_path


def rows() -> list[dict[str, Any]]:
    return [{"image": f"images/{n}.png", "caption": texts, "image_id": f"coco_{n}"} for n, texts in CAPTIONS.items()]


def write_lines(file: Path, objects: list[Any]) -> Path:
    file.write_text("".join(json.dumps(item) + "\n" for item in objects), "utf-8")
    return file


def write_karpathy(file: Path) -> Path:
    splits = {"a": "train", "b": "restval", "c": "train", "x": "val"}
    images = [
        {
            "filepath": "images",
            "filename": f"{name}.png",
            "cocoid": name,
            "imgid": number,
            "split": split,
            "sentids": [0],
            "sentences": [{"raw": text, "tokens": text.split()} for text in CAPTIONS.get(name, ["held out"])],
        }
        for number, (name, split) in enumerate(splits.items())
    ]
    file.write_text(json.dumps({"dataset": "coco", "images": images}), "utf-8")
    return file


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def content(records: list[PairRecord]) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(load_image(record.image).numpy().tobytes(), record.captions) for record in records]


def test_three_files_with_the_same_content_give_the_same_records(folder: Path) -> None:
    """Bug: a layout that loses captions, restval images, ids, or the file's folder as the root of its paths."""
    ours = read_pairs(write_lines(folder / "pairs.jsonl", rows()))
    albef_file = folder / "coco.json"
    albef_file.write_text(json.dumps(rows(), indent=1), "utf-8")
    karpathy_file = write_karpathy(folder / "dataset_coco.json")
    for other in (read_pairs(albef_file), read_pairs(karpathy_file, "train")):
        assert [(r.image, r.captions, r.image_id) for r in other] == [(r.image, r.captions, r.image_id) for r in ours]
    assert [r.line for r in ours] == [1, 2, 3]
    assert [r.captions for r in read_pairs(karpathy_file, "val")] == [("held out",)]
    assert all(Path(str(r.image)).is_absolute() and Path(str(r.image)).exists() for r in ours)
    assert [r.captions for r in ours] == [tuple(texts) for texts in CAPTIONS.values()]


def test_shards_give_the_same_pictures_and_captions(folder: Path) -> None:
    """Bug: captions shifted against images, the .json ignored, or shards in another order than their names."""
    single = [{**row, "caption": row["caption"][0]} for row in rows()]
    expected = content(read_pairs(write_lines(folder / "pairs.jsonl", single)))
    shards = folder / "shards"
    shards.mkdir()
    failed = json.dumps({"caption": "gone", "status": "failed_to_download", "key": "3"}).encode()
    last = {"2.json": json.dumps({"caption": CAPTIONS["c"][0], "status": "success"}).encode(), "2.png": png("c")}
    write_shard(shards / "00001.tar", {**last, "3.json": failed})
    first = {"0.png": png("a"), "0.txt": b"a red kite\n", "1.txt": b"two cups", "1.PNG": png("b"), "1.json": b"{}"}
    write_shard(shards / "00000.tar", first)
    for path in (shards, shards / "0*.tar", shards / "0000[01].tar"):
        assert content(read_pairs(path)) == expected
    assert content(read_pairs(shards / "00001.tar")) == expected[2:]
    assert len({record.image_id for record in read_pairs(shards)}) == 3


def test_defaults_and_optional_keys(folder: Path) -> None:
    """Bug: rows of one picture under two names, integer ids refused, or `directory` lost."""
    row = {"image": "images/a.png", "caption": "x"}
    file = write_lines(folder / "p.jsonl", [row, row, {**row, "image_id": 7, "directory": "5"}])
    first, second, third = read_pairs(file)
    assert first.image_id == second.image_id == str(folder / "images/a.png")
    assert (third.image_id, third.directory, first.directory) == ("7", "5", None)
    ids = [{**row, "caption_id": 5}, {**row, "caption": ["x", "y"], "caption_id": ["a", 7]}, row]
    read = read_pairs(write_lines(folder / "ids.jsonl", ids))
    assert [record.caption_ids for record in read] == [("5",), ("a", "7"), ()]
    absolute = write_lines(folder / "q.jsonl", [{"image": "/elsewhere/a.png", "caption": "x"}])
    assert read_pairs(absolute)[0].image == "/elsewhere/a.png"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "x"}, "field 'image' is missing; add a path"),
        ({"image": "a.png"}, "field 'caption' is missing"),
        ({"image": "", "caption": "x"}, "field 'image' must be a path"),
        ({"image": 3, "caption": "x"}, "field 'image' must be a path, got 3"),
        ({"image": "a.png", "caption": []}, "field 'caption' must be a string or a non-empty list"),
        ({"image": "a.png", "caption": ["x", None]}, "field 'caption' must be"),
        ({"image": "a.png", "caption": "x", "image_id": True}, "field 'image_id' must be"),
        ({"image": "a.png", "caption": "x", "image_id": None}, "field 'image_id' must be"),
        (
            {"image": "a.png", "caption": ["x"], "caption_id": [1, 2]},
            "field 'caption_id' must be a string or an integer",
        ),
        ({"image": "a.png", "caption": "x", "imageid": "1"}, "unknown field 'imageid' (did you mean 'image_id'?)"),
        (
            {"image": "a.png", "zzz": "1"},
            "field 'caption' is missing; add a string or a non-empty list of strings "
            "(known fields: image, caption, image_id, directory, foils, caption_id; the row has 'image', 'zzz'",
        ),
        (["a.png", "x"], "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("layout", ["lines", "albef"])
def test_bad_row_is_named(tmp_path: Path, row: Any, message: str, layout: str) -> None:
    """Bug: a bad row is dropped, or its message names no file, line or field."""
    objects = [{"image": "a.png", "caption": "fine"}, row]
    file = tmp_path / "bad.json"
    if layout == "lines":
        write_lines(file, objects)
    else:
        file.write_text(json.dumps(objects), "utf-8")
    with pytest.raises(ValueError) as caught:
        read_pairs(file)
    assert f"{file}:2: " in str(caught.value)
    assert message in str(caught.value)


def test_all_bad_rows_are_counted_and_ten_kinds_listed(tmp_path: Path) -> None:
    """Bug: the user mends one row at a time, or equal errors of thousands of rows are one line of a page."""
    file = tmp_path / "bad.jsonl"
    rows = [{"image": number, "caption": "x"} for number in range(13)]
    file.write_text("".join(f"{json.dumps(row)}\nnot json\n" for row in rows), "utf-8")
    with pytest.raises(ValueError) as caught:
        read_pairs(file)
    text = str(caught.value)
    assert text.startswith("26 problem(s)")
    assert text.count(f"{file}:") == 2
    assert f"{file}:1: field 'image' must be a path, got 0 (and 12 more like it, the last in line 25)" in text
    assert f"{file}:2: not valid JSON" in text
    values = [*"abcdefghijkl"]
    file.write_text("".join(json.dumps({"image": "x", f"caption_{v}": v}) + "\n" for v in values))
    with pytest.raises(ValueError) as caught:
        read_pairs(file)
    assert str(caught.value).count(f"{file}:") == 10
    assert str(caught.value).endswith("; and 2 more")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"[]", "no image-caption pair"),
        (b'[{"image": "a.png", "caption": "x"}', "cut short"),
        (b'{"image": "a.png", "capt', ":1: not valid JSON"),
        (b'{"image": "\xff", "caption": "x"}', "not UTF-8"),
        (b'{"images": 5}', "'images' must be a list"),
        (b'{"images": []}', "needs a split"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    """Bug: an empty or cut file trains on nothing, or fails with a traceback from inside the parser."""
    file = tmp_path / "damaged.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(file)
    assert str(file) in str(caught.value)


def test_karpathy_mistakes(tmp_path: Path) -> None:
    """Bug: a mistyped split gives another one, or an image without captions is dropped in silence."""
    file = write_karpathy(tmp_path / "k.json")
    for split in (None, "training"):
        with pytest.raises(ValueError, match="needs a split out of restval, train, val"):
            read_pairs(file, split)
    document = json.loads(file.read_text())
    del document["images"][2]["sentences"][0]["raw"]
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"k\.json:3: .*'raw'"):
        read_pairs(file, "train")
    lines = write_lines(tmp_path / "p.jsonl", rows())
    with pytest.raises(ValueError, match="only Karpathy files have splits"):
        read_pairs(lines, "train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.txt": b"no image"}, "0: no image for this caption"),
        ({"0.png": b"x"}, "0: no caption"),
        ({"0.png": b"x", "0.json": b"{}"}, "0: no caption"),
        ({"0.png": b"x", "0.json": b"{"}, "0: "),
        ({"0.png": b"x", "0.txt": b"\xff"}, "0: the .txt member is not UTF-8 text"),
    ],
)
def test_shard_mistakes(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    """Bug: an image without a caption, or the reverse, is dropped in silence."""
    shard = write_shard(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(shard)
    assert str(shard) in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tar shard"):
        read_pairs(tmp_path / "empty")


def test_clean_caption() -> None:
    """Bug: invisible captions pass for text, 10,000 words reach the tokenizer, or lone surrogates crash it."""
    assert clean_caption("  a \t red\n\u00a0kite ") == "a red kite"
    assert clean_caption("ﬁne Ａ") == "fine A"  # NFKC: ligature and full-width letter
    assert clean_caption("cafe\u0301") == "café"
    for empty in ("", " \n\t", "\u200b\u200d", "\x00\x07", "\u3000"):
        assert clean_caption(empty) == ""
    long = clean_caption("word " * 30_000)
    assert len(long) <= MAX_CAPTION_CHARS
    assert set(long.split()) == {"word"}
    assert len(clean_caption("\ufdfa" * 50_000)) <= MAX_CAPTION_CHARS  # one character, 18 after NFKC
    assert len(clean_caption("x" * 200_000)) == MAX_CAPTION_CHARS
    whole = " ".join(f"word{k}" for k in range(400))  # 3,089 characters
    assert clean_caption(whole) == whole
    clean_caption("\ud800 odd").encode("utf-8")


def test_a_caption_of_marks_alone_is_empty() -> None:
    """Bug: accents without a letter under them pass for text, and the network reads [CLS] [SEP]; or scripts that are
    written with marks are taken for empty.
    """
    for empty in ("\u0301", "\u0301\u0308 \u20dd", "\u093e\u0902", "\ufe0f"):
        assert clean_caption(empty) == ""
    for text in ("हिन्दी", "कि", "مُحَمَّد", "\U0001f600", "❤\ufe0f", "?", "a\u0323\u0302"):
        assert clean_caption(text) != ""


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"a\n\n", ["a", ""]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),  # as a text editor on Windows saves it
        ("a\u2028b\u0085c\x0bd\x0ce\x1cf\ng\n".encode(), ["a\u2028b\u0085c\x0bd\x0ce\x1cf", "g"]),
    ],
)
def test_lines_end_at_line_feeds_alone(tmp_path: Path, data: bytes, lines: list[str]) -> None:
    """Bug: a row is cut in two inside a sentence from the web, or an empty line in the middle shifts the numbers."""
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert read_lines(tmp_path / "rows.jsonl") == lines


def test_validate_warns(folder: Path) -> None:
    """Bug: repeated rows, empty captions or captions that will be cut pass unseen."""
    texts = ["a kite", "other", "a kite", "", "word " * 30_000]
    file = write_lines(folder / "p.jsonl", [{"image": "images/a.png", "caption": text} for text in texts])
    report = "\n".join(validate_pairs(file))
    assert "rows: 5" in report
    assert f"1 rows repeat an image with the same caption: {file}:3 (first at {file}:1)" in report
    assert f"1 rows have an empty caption (the bad-sample policy decides): {file}:4" in report
    assert f"characters (it will be cut): {file}:5" in report
    assert "warning" not in "\n".join(validate_pairs(write_lines(folder / "q.jsonl", rows())))


def test_check_counts_every_image_once(folder: Path) -> None:
    """Bug: a missing or damaged image is not found before training, or one image counts as often as it has rows."""
    (folder / "images/b.png").write_bytes(png("b")[:40])
    (folder / "images/c.png").unlink()
    report = check_pairs(write_lines(folder / "p.jsonl", rows() + rows()))
    assert (report.expected, report.found, len(report.unreadable)) == (3, 1, 2)
    assert "b.png" in report.unreadable[0]
    assert "c.png" in report.unreadable[1]
    assert report.lines()[0] == "images: expected 3, found 1, unreadable 2"
