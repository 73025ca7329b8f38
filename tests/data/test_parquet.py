"""The parquet reader, on files that pyarrow writes."""

import sys
from pathlib import Path

import pytest

from mamo.data.parquet import image_content, parquet_files, read_parquet

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def write(file: Path, columns: dict[str, list[object]], rows_a_group: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file, row_group_size=rows_a_group)
    return file


def test_rows_come_in_order_with_their_place(tmp_path: Path) -> None:
    """Bug: rows of a second row group or file are lost, doubled, or named by the wrong number."""
    first = write(tmp_path / "a/0.parquet", {"text": ["a", "b", "c"], "n": [1, 2, 3]})
    second = write(tmp_path / "a/1.parquet", {"text": ["d"], "n": [4]})
    empty = write(tmp_path / "a/2.parquet", {"text": pyarrow.array([], "string")})
    assert parquet_files(tmp_path) == [first, second, empty]
    assert list(read_parquet(parquet_files(tmp_path), ["text"])) == [
        (f"{first}: row 0", {"text": "a"}), (f"{first}: row 1", {"text": "b"}), (f"{first}: row 2", {"text": "c"}),
        (f"{second}: row 0", {"text": "d"}),
    ]  # fmt: skip


def test_images_in_four_shapes(tmp_path: Path) -> None:
    """Bug: bytes that lie in a struct are not found, or null bytes with a path are called missing."""
    (tmp_path / "x.png").write_bytes(b"png")
    cells = [
        {"bytes": b"png", "path": None},
        {"bytes": None, "path": "x.png"},
        {"bytes": None, "path": "gone.png"},
        None,
    ]
    file = write(tmp_path / "0.parquet", {"image": cells, "plain": pyarrow.array([b"png"] * 4, "large_binary")})
    found = [row for _, row in read_parquet([file], ["image", "plain"])]
    assert [image_content(row["image"], "p", tmp_path) for row in found] == [b"png", tmp_path / "x.png", None, None]
    assert image_content(found[0]["plain"], "p", tmp_path) == b"png"
    with pytest.raises(ValueError, match=r"p: must be an image .*, got 3"):
        image_content(3, "p", tmp_path)


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback of pyarrow for a damaged file, a missing column, or a missing library."""
    file = write(tmp_path / "0.parquet", {"text": ["a" * 1000]})
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(file.read_bytes()[:40])
    for files, columns, message in (
        ([file], ["caption"], r"0\.parquet: has no column 'caption'; its columns: text"),
        ([damaged], ["text"], r"damaged\.parquet: not a parquet file, or damaged \(.*\); fetch it again"),
        ([tmp_path / "absent.parquet"], ["text"], "no such file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            list(read_parquet(files, columns))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"contains no file \*\.parquet"):
        parquet_files(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install mamo\[parquet\]"):
        list(read_parquet([file], ["text"]))
