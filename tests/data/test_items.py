"""The reader of items: what it takes, and one message for each kind of mistake."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mamo.commands.data import main
from mamo.data.items import Item, read_items, right_and_wrong

GOOD = {"images": ["a.jpg"], "texts": ["a red kite", "a blue kite"], "right": [[0, 0]], "group": "colour", "id": "1"}


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(row if isinstance(row, str) else f"{json.dumps(row)}\n" for row in rows))
    return file


def test_items_are_read_with_lines_and_digest(tmp_path: Path) -> None:
    """Bug: paths that are relative to the current folder, lines counted without blank ones, boxes keyed by text."""
    rows = [
        {**GOOD, "boxes": {"0": [1, 2, 3, 4.5]}, "set": "s"},
        "\n",
        {**GOOD, "id": "2", "images": ["a.jpg", "sub/b.jpg"], "right": [[0, 0], [1, 1]], "set": {"pair": "p"}},
        {"images": ["a.jpg"], "texts": ["a kite"], "right": [], "group": "false", "id": "3"},
    ]  # fmt: skip
    file = write(tmp_path / "items.jsonl", *rows)
    found = read_items(file)
    assert found.lines == [1, 3, 4]
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.items[0].boxes == {0: (1, 2, 3, 4.5)}
    assert found.items[0].set == {"set": "s"}
    assert found.items[1].images == [str(tmp_path / "a.jpg"), str(tmp_path / "sub/b.jpg")]
    assert [item.is_statement for item in found.items] == [False, False, True]


def test_right_and_wrong_pairs_of_an_image_and_of_a_text() -> None:
    """Bug: image and text exchanged, or a comparison without a wrong side."""
    item = Item(images=["a", "b"], texts=["x", "y"], right=[(0, 0), (1, 1)], group="g", id="1")
    assert right_and_wrong(item, 0) == [([(0, 0)], [(0, 1)]), ([(1, 1)], [(1, 0)])]
    assert right_and_wrong(item, 1) == [([(0, 0)], [(1, 0)]), ([(1, 1)], [(0, 1)])]
    one = Item(images=["a", "b"], texts=["x"], right=[(0, 0)], group="g", id="1")
    assert right_and_wrong(one, 0) == []
    assert right_and_wrong(one, 1) == [([(0, 0)], [(1, 0)])]


MISTAKES: list[tuple[Any, str]] = [
    ({**GOOD, "image": "a.jpg"}, r"unknown field 'image'; rename or remove it; known fields: images, texts, right"),
    ({"grup": "x", **{k: v for k, v in GOOD.items() if k != "group"}}, "'group' is missing; unknown field 'grup'"),
    ({**GOOD, "box": {"0": [0, 0, 1, 1]}}, "unknown field 'box'"),
    ({**GOOD, "right": [[1, 0]]}, r"field 'right': \[1, 0\] names an image or text that does not exist; the item"),
    ({**GOOD, "right": [[0, -1]]}, r"field 'right': \[0, -1\] names an image"),
    ({**GOOD, "right": [[0, True]]}, r"field 'right' must be a list of \[index of an image, index of a text\]"),
    ({**GOOD, "right": []}, "field 'right': nothing is compared"),
    ({**GOOD, "right": [[0, 0], [0, 1]]}, "field 'right': nothing is compared"),
    ({**GOOD, "boxes": {"1": [0, 0, 1, 1]}}, "field 'boxes': image 1 does not exist"),
    ({**GOOD, "boxes": {"0": [0, 0, 0, 1]}}, r"field 'boxes' must be an object of boxes \[x, y, width, height\]"),
    ({**GOOD, "boxes": {"a": [0, 0, 1, 1]}}, "field 'boxes' must be an object"),
    ({**GOOD, "boxes": [0, 0, 1, 1]}, "field 'boxes' must be an object"),
    ({**GOOD, "texts": ["a kite"] * 2}, "field 'texts': texts 0 and 1 are equal, \"a kite\"; change or remove one"),
    ({**GOOD, "texts": ["a"] * 6}, "field 'texts' must be a list of one to five texts that are not blank"),
    ({**GOOD, "texts": ["a", " "]}, "field 'texts' must be"),
    ({**GOOD, "images": []}, "field 'images' must be a list of one or two paths"),
    ({**GOOD, "images": ["a.jpg", "a.jpg"], "right": [[0, 0], [1, 1]]}, "field 'images': both are the same image"),
    ({**GOOD, "group": " "}, "field 'group' must be a text that is not blank"),
    ({**GOOD, "id": 1}, "field 'id' must be a text that no other item has, got 1"),
    ({**GOOD, "set": []}, "field 'set' must be a text, or an object of texts"),
    (["a"], "must be a JSON object with fields images"),
    ("{'id': 1}\n", "not valid JSON .*; write one object a line"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_one_line_with_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    """Bug: an index that does not exist is met in the middle of an evaluation; a mistyped key changes the number."""
    file = write(tmp_path / "items.jsonl", {**GOOD, "id": "0"}, row)
    with pytest.raises(ValueError, match=rf"^1 problem\(s\): {file}:2: .*{message}") as caught:
        read_items(file)
    assert "\n" not in str(caught.value)


def test_repeated_ids_and_empty_files(tmp_path: Path) -> None:
    """Bug: two items of one id overwrite each other; an empty file scores 100 %."""
    file = write(tmp_path / "items.jsonl", GOOD, GOOD)
    with pytest.raises(ValueError, match=r'items\.jsonl:2: id "1" occurs twice, first in line 1'):
        read_items(file)
    with pytest.raises(ValueError, match=r"items\.jsonl: contains no items"):
        read_items(write(file, "\n"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_items(tmp_path / "absent.jsonl")


def test_equal_texts_of_an_official_file_are_counted(tmp_path: Path) -> None:
    """Bug: a published set that has such an item cannot be scored, or the item disappears."""
    file = write(tmp_path / "items.jsonl", GOOD, {**GOOD, "id": "2", "texts": ["a", "b", "a"]})
    found = read_items(file, is_official=True)
    assert (len(found.items), found.n_equal_texts) == (2, 1)


def test_the_commands_read_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: `mamo data validate` cannot say what an evaluation refuses, or `check` misses an image."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    good = write(tmp_path / "items.jsonl", {**GOOD, "boxes": {"0": [0, 0, 20, 10]}})
    assert main(["validate", str(good), "--task", "items"]) == 0
    assert capsys.readouterr().out.splitlines()[1:4] == ["items: 1", "images: 1", "groups: 1 (colour 1)"]
    assert main(["check", str(good), "--task", "items"]) == 0
    bad = write(
        tmp_path / "bad.jsonl", {**GOOD, "boxes": {"0": [0, 0, 30, 10]}}, {**GOOD, "id": "2", "images": ["b.jpg"]}
    )
    with pytest.raises(ValueError, match=rf"^1 problem\(s\): {bad}:1: field 'boxes': \[0.0, 0.0, 30.0, 10.0\] is not"):
        main(["validate", str(bad), "--task", "items"])
    assert main(["check", str(bad), "--task", "items"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:][0] == "images: expected 2, found 1, unreadable 2"
