"""CSV, TSV and `metadata.jsonl` as they are, against the same rows as JSON Lines."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mamo.data.pair_record import PairRecord
from mamo.data.pairs_reader import read_pairs

TEXTS = ['a kite, red, and "new"', "two\nlines\tof text", "plain", "日本語; ein Drache | x"]


def content(records: object) -> list[tuple[str, tuple[str, ...], str]]:
    assert isinstance(records, Sequence)
    return [(str(record.image), record.captions, record.image_id) for record in records]


def lines(folder: Path) -> list[PairRecord]:
    rows = [{"image": f"{k}.jpg", "caption": text, "image_id": k} for k, text in enumerate(TEXTS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*read_pairs(folder / "pairs.jsonl")]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";"), ("a.txt", "|")])
@pytest.mark.parametrize("header", [("image", "caption"), ("file_name", "text"), ("filepath", "title"), None])
def test_a_table_is_its_rows(tmp_path: Path, name: str, delimiter: str, header: tuple[str, str] | None) -> None:
    """Bug: a quoted separator, mark or line break splits a row, a column is known by one spelling only, or the header
    is a pair.
    """
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        if header:
            writer.writerow([*header, "image_id", "url"])
        writer.writerows([f"{k}.jpg", text, k, "http://x"] for k, text in enumerate(TEXTS))
    columns = () if header else ("image", "caption", "image_id", "url")
    found = read_pairs(tmp_path / name, columns=columns)
    assert content(found) == content(lines(tmp_path))
    assert [record.line for record in found] == [k + bool(header) for k in (1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.jpg,a kite, red\n", r"a\.csv:2: 3 columns, 2 names \(image, caption\); put a text with ','"),
        ("image,image\na.jpg,b\n", r"a\.csv:1: two columns have the name 'image'; rename one"),
        ('image,caption\na.jpg,"a kite\n\nb.jpg,x', r"a\.csv:2: not a row of a table .*; close the quotation marks"),
        ("picture,words\na.jpg,x\n", r"a\.csv:2: field 'image' is missing"),
        ("image,caption\n", r"a\.csv: contains no image-caption pairs"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Bug: a row with one separator too many is cut in silence, or an open quotation mark swallows the file."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_image_folder_is_read_by_its_metadata(tmp_path: Path, name: str) -> None:
    """Bug: the rows of a Hugging Face image folder are unknown fields, or their paths are not those of its pictures."""
    expected = content(lines(tmp_path))
    folder = tmp_path / "images"
    folder.mkdir()
    rows = [{"file_name": f"{k}.jpg", "text": text, "image_id": str(k)} for k, text in enumerate(TEXTS)]
    with (folder / name).open("w", newline="") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    for path in (folder, folder / name):
        found = content(read_pairs(path))
        assert [(Path(image).name, captions, own) for image, captions, own in found] == [
            (Path(image).name, captions, own) for image, captions, own in expected
        ]
        assert {Path(image).parent for image, _, _ in found} == {folder}
