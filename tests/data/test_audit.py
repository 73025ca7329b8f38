"""The audit finds copies after resizing and recompression, and nothing where there is nothing."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mamo.commands.data import main
from mamo.data.audit import MAX_DISTANCE, HashIndex, difference_hash, find_overlap


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A smooth random picture: what photographs have in common is that neighbours are alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def copied(image: Image.Image, size: tuple[int, int], quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def write(folder: Path, images: dict[str, Image.Image]) -> Path:
    folder.mkdir()
    rows = []
    for name, image in images.items():
        image.save(folder / f"{name}.png")
        rows.append({"image": f"{name}.png", "caption": "x", "image_id": name})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_copies_are_found_and_strangers_are_not(tmp_path: Path) -> None:
    """Bug: a hash of the bytes, one that depends on the size, or one so coarse that all pictures are alike."""
    train = write(tmp_path / "train", {f"t{k}": picture(k) for k in range(40)} | {"shared": picture(99)})
    copies = {f"e{k}": copied(picture(k), size, quality) for k, size, quality in (
        (3, (320, 240), 30), (4, (60, 45), 90), (5, (160, 100), 60)
    )}  # fmt: skip
    strangers = {f"s{k}": picture(1000 + k) for k in range(20)}
    held_out = write(tmp_path / "eval", {**copies, **strangers, "shared": picture(500)})
    report = find_overlap(train, held_out)
    assert (report.n_train, report.n_eval, len(report.by_id), len(report.by_looks)) == (41, 24, 1, 3)
    assert not report.is_complete
    assert any(f"{tmp_path}/eval/e4.png looks like {tmp_path}/train/t4.png (" in line for line in report.lines())
    assert find_overlap(train, write(tmp_path / "other", strangers)).is_complete


def test_looks_alone_do_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: drawings that look alike end a pipeline; or there is no list of them, and no threshold."""
    train = write(tmp_path / "train", {f"t{k}": picture(k) for k in range(12)})
    held_out = write(tmp_path / "eval", {f"e{k}": copied(picture(k), (90, 70), 40) for k in range(12)})
    assert main(["audit", str(train), str(held_out), "--to", str(tmp_path / "out/found.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "12 (100.00 %)" in text
    assert text.count(" looks like ") == 10
    assert "and 2 more; --to FILE lists all" in text
    rows = [json.loads(line) for line in (tmp_path / "out/found.jsonl").read_text().splitlines()]
    assert {(Path(row["eval"]).stem[1:], Path(row["train"]).stem[1:]) for row in rows} == {
        (str(k),) * 2 for k in range(12)
    }
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
    exact = find_overlap(train, held_out, distance=0)
    assert len(exact.by_looks) == sum(row["distance"] == 0 for row in rows)
    assert len(find_overlap(train, write(tmp_path / "x", {"s": picture(99)}), distance=63).by_looks) == 1
    for distance in (-1, 64):
        with pytest.raises(ValueError, match=f"distance must be between 0 and 63 of 64 bits, got {distance}"):
            main(["audit", str(train), str(held_out), "--distance", str(distance)])
    (tmp_path / "out/found.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        main(["audit", str(train), str(held_out), "--to", str(tmp_path / "out/found.jsonl")])
    assert main(["audit", str(train), str(train)]) == 1


def test_blank_and_broken_pictures(tmp_path: Path) -> None:
    """Bug: all blank pages are found in each other, or an unreadable image counts as clean."""
    blank = Image.new("RGB", (90, 90), (250, 250, 250))
    train, held_out = write(tmp_path / "a", {"x": blank}), write(tmp_path / "b", {"y": blank, "z": picture(1)})
    report = find_overlap(train, held_out)
    assert report.is_complete
    assert "compared by id only, their contrast is too low for a hash: 1 and 1" in report.lines()
    (tmp_path / "b/z.png").write_bytes(b"")
    report = find_overlap(train, held_out)
    assert (report.is_complete, report.n_plain) == (False, (1, 1))
    assert "z.png: zero bytes" in report.lines()[-1]


def test_the_index_equals_comparing_all() -> None:
    """Bug: a band at the edge left out, so that some copies within the distance are missed."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64) * np.uint64(2) + rng.integers(0, 2, 300, dtype=np.uint64)
    for distance in (0, 1, MAX_DISTANCE, 9):
        index = HashIndex(hashes, distance)
        check_index(index, hashes, rng, distance)


def check_index(index: HashIndex, hashes: NDArray[np.uint64], rng: np.random.Generator, distance: int) -> None:
    for trial in range(300):
        value = int(hashes[trial % 300])
        for bit in rng.choice(64, rng.integers(0, 2 * distance + 2), replace=False):
            value ^= 1 << int(bit)
        distances = [(value ^ int(other)).bit_count() for other in hashes]
        expected = int(np.argmin(distances)) if min(distances) <= distance else None
        assert index.nearest(value) == expected


@pytest.mark.parametrize("side", [9, 40, 333])
def test_the_hash_reads_from_left_to_right(side: int) -> None:
    """Bug: rows for columns, or bits of the darker neighbour."""
    ramp = np.tile(np.linspace(0, 255, side).astype(np.uint8)[None, :, None], (side, 1, 3))
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp[:, ::-1]) == 0
