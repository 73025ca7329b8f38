"""The NLVR builder on a small release made here in the real format, and on the real one where there is one."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mamo.data.builders.nlvr import NlvrCounts, build_nlvr
from mamo.data.pairs_reader import read_pairs
from mamo.data.validate import check_pairs

RECORDS = [
    ("1-0", "0", "There is a yellow block.", "true"),
    ("1-1", "1", "There is a yellow block.", "false"),
    ("7-3", "1", "One box is empty.", "true"),
]


def picture(identifier: str, permutation: int) -> bytes:
    buffer = io.BytesIO()
    seed = (int(identifier.replace("-", "")), permutation)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 40, 4), dtype=np.uint8), "RGBA").save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def make_release(folder: Path, unpacked: bool = False, extra: dict[str, bytes] | None = None, drop: str = "") -> Path:
    folder.mkdir()
    rows = [
        {"sentence": s, "label": label, "identifier": i, "directory": d, "evals": {"r0": label}, "structured_rep": []}
        for i, d, s, label in RECORDS
    ]
    (folder / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"images/{d}/dev-{i}-{k}.png": picture(i, k) for i, d, _, _ in RECORDS for k in range(6)}
    files = {name: data for name, data in {**files, **(extra or {})}.items() if name != drop}
    if unpacked:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    else:
        with tarfile.open(folder / "dev-images.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def statements(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "statements.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("unpacked", [False, True])
def test_small_release(tmp_path: Path, unpacked: bool) -> None:
    """Bug: false sentences become captions, permutations are lost or crossed, or folds cannot be made."""
    counts = build_nlvr(make_release(tmp_path / "release", unpacked), tmp_path / "out")
    assert counts == NlvrCounts(records=3, images=18, pairs=12, statements=18)
    assert not counts.is_complete
    pairs = read_pairs(tmp_path / "out/pairs.jsonl")
    expected = [
        (f"{tmp_path}/out/images/{d}/dev-{i}-{k}.png", (s,), d, picture(i, k))
        for i, d, s, label in RECORDS if label == "true" for k in range(6)
    ]  # fmt: skip
    assert [(p.image, p.captions, p.directory, Path(str(p.image)).read_bytes()) for p in pairs] == expected
    assert len({pair.image_id for pair in pairs}) == 12
    assert check_pairs(tmp_path / "out/pairs.jsonl").found == 12
    rows = [(r["image"], r["sentence"], r["label"], r["identifier"], r["directory"], r["permutation"])
            for r in statements(tmp_path / "out")]  # fmt: skip
    assert rows == [(f"images/{d}/dev-{i}-{k}.png", s, label == "true", i, d, k)
                    for i, d, s, label in RECORDS for k in range(6)]  # fmt: skip


def test_same_picture_under_two_names_has_one_id(tmp_path: Path) -> None:
    """Bug: a picture that the release holds twice is a negative of itself."""
    twin = {"images/1/dev-7-3-5.png": picture("1-0", 2)}
    build_nlvr(make_release(tmp_path / "release", extra=twin), tmp_path / "out")
    ids = {Path(str(p.image)).name: p.image_id for p in read_pairs(tmp_path / "out/pairs.jsonl")}
    assert ids["dev-7-3-5.png"] == ids["dev-1-0-2.png"]
    assert len(set(ids.values())) == 11


def test_missing_picture_shows_in_the_counts(tmp_path: Path) -> None:
    """Bug: a row about a picture that is not there, found out in training."""
    release = make_release(tmp_path / "release", drop="images/0/dev-1-0-4.png")
    counts = build_nlvr(release, tmp_path / "out")
    assert (counts.images, counts.pairs, counts.statements) == (17, 11, 17)
    assert "images: expected 5934, found 17" in counts.lines()
    assert check_pairs(tmp_path / "out/pairs.jsonl").unreadable == ()


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    """Bug: a tar member or a record whose name climbs out of the folder is written where it says."""
    release = make_release(tmp_path / "release", extra={"../evil.png": b"x", "images/0/extra.png": b"x"})
    build_nlvr(release, tmp_path / "out")
    assert not list(tmp_path.rglob("evil.png"))
    assert not list((tmp_path / "out").rglob("extra.png"))
    for key, value in (("directory", "../.."), ("identifier", "../x-0"), ("label", "True"), ("sentence", 3)):
        row = json.loads((release / "dev.json").read_text().splitlines()[0])
        (release / "dev.json").write_text(json.dumps({**row, key: value}) + "\n")
        with pytest.raises(ValueError, match=rf"dev\.json:1: field '{key}'"):
            build_nlvr(release, tmp_path / "other")
        (release / "dev.json").write_text(json.dumps(row) + "\n")


def test_a_sentence_may_hold_odd_line_ends(tmp_path: Path) -> None:
    """Bug: a row is cut in two at a character that ends a line for Python and not for JSON."""
    release = make_release(tmp_path / "release")
    text = (release / "dev.json").read_text().replace("One box is empty.", "One box\u2028is\u0085empty.")
    (release / "dev.json").write_text(text, "utf-8")
    assert build_nlvr(release, tmp_path / "out").records == 3
    assert read_pairs(tmp_path / "out/pairs.jsonl")[-1].captions == ("One box\u2028is\u0085empty.",)


def test_incomplete_releases_are_refused_by_name(tmp_path: Path) -> None:
    """Bug: a release without its list or its pictures gives empty files."""
    with pytest.raises(ValueError, match=r"dev\.json: no such file"):
        build_nlvr(tmp_path, tmp_path / "out")
    release = make_release(tmp_path / "release")
    tar = release / "dev-images.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"dev-images\.tar"):
        build_nlvr(release, tmp_path / "out")
    tar.unlink()
    with pytest.raises(ValueError, match="neither an images folder nor"):
        build_nlvr(release, tmp_path / "out")


def test_real_release(tmp_path: Path) -> None:
    """Bug: anything that only the real data shows; the counts are the published ones."""
    root = os.environ.get("MAMO_TEST_DATA")
    if root is None or not (Path(root) / "nlvr").is_dir():
        pytest.skip("MAMO_TEST_DATA with an nlvr folder is not set")
    counts = build_nlvr(Path(root) / "nlvr", tmp_path)
    assert counts.is_complete
    assert counts == NlvrCounts(records=989, images=5934, pairs=547 * 6, statements=5934)
    rows = statements(tmp_path)
    assert Counter(row["label"] for row in rows) == {True: 547 * 6, False: 442 * 6}
    assert len({row["sentence"] for row in rows}) == 249
    assert {row["directory"] for row in rows} == set("012345")
    report = check_pairs(tmp_path / "pairs.jsonl")
    assert (report.found, report.unreadable) == (3282, ())
    with tarfile.open(Path(root) / "nlvr/dev-images.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    written = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*.png")}
    assert {n: hashlib.sha256(d).digest() for n, d in written.items()} == {
        n: hashlib.sha256(d).digest() for n, d in members.items()
    }


def test_folds_hold_out_one_directory_each(tmp_path: Path) -> None:
    """Bug: a picture of the held-out directory is trained on under another name, or paths point beside the images."""
    shared = {"images/1/dev-7-3-0.png": picture("1-0", 0)}  # the same picture as one of directory 0
    out = tmp_path / "out"
    build_nlvr(make_release(tmp_path / "release", extra=shared), out)
    for fold, held_out in enumerate(("0", "1")):
        train = read_pairs(out / f"fold-{fold}" / "train.jsonl")
        held = read_pairs(out / f"fold-{fold}" / "eval.jsonl")
        assert {pair.directory for pair in held} == {held_out}
        assert {pair.directory for pair in train} == {"0", "1"} - {held_out}
        assert len(held) == 6
        assert len(train) == 5  # the shared picture is kept out of either training half
        bytes_of = [{Path(str(pair.image)).read_bytes() for pair in pairs} for pairs in (train, held)]
        assert not bytes_of[0] & bytes_of[1]
        labelled = (out / f"fold-{fold}" / "statements.jsonl").read_text("utf-8").splitlines()
        assert len(labelled) == (6 if held_out == "0" else 12)
    assert not (out / "fold-2").exists()
