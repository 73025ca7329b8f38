"""Conceptual Captions and SBU, whose pictures come from img2dataset's folders."""

import hashlib
import json
from pathlib import Path

import pytest

from mamo.data.builders import web
from mamo.data.builders.web import build_cc3m, build_sbu
from mamo.data.pairs_reader import read_pairs


def fetched(source: Path, key: str, url: str, suffix: str = "jpg") -> None:
    """One picture in the layout of `img2dataset --output_format files`."""
    folder = source / "images" / key[:5]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{key}.json").write_text(json.dumps({"url": url, "caption": "x", "key": key, "status": "success"}))
    if suffix:
        (folder / f"{key}.{suffix}").write_bytes(key.encode())


def test_cc3m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: captions by order instead of by link, a dead link as a row, or no count of what is gone."""
    source = tmp_path / "cc3m"
    fetched(source, "000000001", "http://x/b")
    fetched(source, "000010000", "http://x/a", "png")
    fetched(source, "000010001", "http://x/dead", "")
    (source / "images" / "00000_stats.json").write_text('{"count": 2}')
    lines = ["a kite\thttp://x/a", "a dog\thttp://x/b", "gone\thttp://x/dead", "never\thttp://x/z"]
    (source / "Train_GCC-training.tsv").write_text("\n".join(lines) + "\n")
    report = build_cc3m(source, tmp_path / "out")
    rows = read_pairs(tmp_path / "out" / "train.jsonl")
    assert [(row.captions, row.image_id) for row in rows] == [
        (("a kite",), f"cc3m/{hashlib.sha256(b'http://x/a').hexdigest()[:16]}"),
        (("a dog",), f"cc3m/{hashlib.sha256(b'http://x/b').hexdigest()[:16]}"),
    ]
    assert [Path(str(row.image)).read_bytes() for row in rows] == [b"000010000", b"000000001"]
    assert report.lines() == [
        "train rows of the list: found 4, expected 3318333",
        "train images: found 2, expected 4",
        "not found, so not built: Validation_GCC-1.1.0-Validation.tsv",
    ]
    assert not report.is_complete
    (source / "Train_GCC-training.tsv").write_text("a kite http://x/a\n")
    with pytest.raises(ValueError, match=r"training\.tsv:1: needs a caption, a tab and a link"):
        build_cc3m(source, tmp_path / "other")
    with pytest.raises(ValueError, match="contains neither Train_GCC"):
        build_cc3m(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("form", ["json", "txt"])
def test_sbu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Bug: one of the two official forms is not read, or lists of other lengths are joined."""
    monkeypatch.setattr(web, "_SBU_ROWS", 2)
    source, urls, captions = tmp_path / "sbu", ["http://x/a", "http://x/b"], ["a kite", "a dog"]
    for key, url in (("000000000", urls[0]), ("000000001", urls[1])):
        fetched(source, key, url)
    if form == "json":
        (source / "sbu-captions-all.json").write_text(json.dumps({"image_urls": urls, "captions": captions}))
    else:
        for name, rows in (("urls", urls), ("captions", captions)):
            (source / f"SBU_captioned_photo_dataset_{name}.txt").write_text("\n".join(rows) + "\n")
    report = build_sbu(source, tmp_path / "out")
    assert report.is_complete
    assert [row.captions[0] for row in read_pairs(tmp_path / "out" / "pairs.jsonl")] == captions
    if form == "json":
        (source / "sbu-captions-all.json").write_text(json.dumps({"image_urls": urls, "captions": captions[:1]}))
        with pytest.raises(ValueError, match="as many image_urls as captions"):
            build_sbu(source, tmp_path / "out")


def test_captions_may_hold_odd_line_ends(tmp_path: Path) -> None:
    """Bug: a caption is cut in two at a character that ends a line for Python, and links go to other captions."""
    captions, urls = ["a\u2028red\u0085kite\x0bflies", "a dog"], ["http://x/a", "http://x/b"]
    for key, url in (("000000000", urls[0]), ("000000001", urls[1])):
        fetched(tmp_path, key, url)
    rows = [f"{caption}\t{url}\n" for caption, url in zip(captions, urls)]
    (tmp_path / "Train_GCC-training.tsv").write_text("".join(rows), "utf-8")
    for name, lines in (("urls", urls), ("captions", captions)):
        (tmp_path / f"SBU_captioned_photo_dataset_{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for build, file in ((build_cc3m, "train.jsonl"), (build_sbu, "pairs.jsonl")):
        build(tmp_path, tmp_path / "out")
        assert [row.captions[0] for row in read_pairs(tmp_path / "out" / file)] == captions
