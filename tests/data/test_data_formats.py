"""Files of other formats: each is named, with the way to read it; COCO's captions file is read."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mamo.commands.data import main
from mamo.data.pairs_reader import read_pairs
from mamo.data.records import TASK_RECORDS, TaskName, VqaRecord, read_task_records

PARQUET = b"PAR1\x15\x04\x15\x10" + bytes(40) + b"PAR1"
ROW = '{"image": "a.jpg", "caption": "a kite"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", PARQUET, "a Parquet file; .*mamo data build parquet --from"),
        ("a.jsonl", PARQUET, "a Parquet file"),
        ("a.arrow", b"ARROW1\0\0" + bytes(8), "an Arrow file"),
        ("a.jsonl.gz", gzip.compress(ROW.encode(), mtime=0), "a gzip file; unpack it with gunzip"),
        ("a.tar.gz", gzip.compress(ROW.encode(), mtime=0), "a gzip file; unpack it with gunzip or tar -xzf"),
        ("a.xlsx", b"PK\x03\x04" + bytes(30), "a ZIP archive or spreadsheet"),
        ("a.jsonl", ROW.encode("utf-16"), "UTF-16 text; convert it with iconv"),
        ("a.jsonl", ROW.encode("utf-16-le"), "UTF-16LE text without a byte order mark; .*iconv -f UTF-16LE"),
        ("a.csv", "image,caption\na.jpg,ein Fußball\n".encode("utf-16-be"), "UTF-16BE text without a byte order mark"),
        ("a.db", b"SQLite format 3\0" + bytes(30), "an SQLite database"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(30), "a JPEG image; name a file of records"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a Git LFS pointer; fetch .*git lfs",
        ),
        ("a.jsonl", b"<!DOCTYPE html><html></html>", "an HTML page; fetch the file again"),
        ("a.bin", bytes(257) + b"ustar\x0000" + bytes(500), "a tar archive; give it the suffix .tar"),
    ],
)
def test_another_format_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Bug: a table is 41 times "not valid JSON", Parquet "not UTF-8", and nothing says what to do."""
    file = tmp_path / name
    file.write_bytes(content)
    for read in (lambda: read_pairs(file), lambda: read_task_records(file, VqaRecord)):
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert str(caught.value).startswith(f"{file}: ")
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,image\nwhat,a.jpg\n", "a CSV table; .*csv.DictReader"),
        ("a.txt", b"question;image\nwhat;a.jpg\n", "a CSV table; .*delimiter=';'"),
        ("a.tsv", b"question\timage\nwhat\ta.jpg\n", r"a TSV table; .*delimiter='\\t'"),
    ],
)
def test_a_table_of_records_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Bug: a table of questions is 41 times "not valid JSON"."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_task_records(tmp_path / name, VqaRecord)


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_command_of_the_message_converts(tmp_path: Path, separator: str) -> None:
    """Bug: the command that the message names does not run, or writes something that is not read."""
    file = tmp_path / "a.csv"
    row = f'a.jpg{separator}s{separator}"a kite, red{separator} and ""new"""'
    file.write_text(f"image{separator}sentence{separator}text\n{row}\n", "utf-8-sig")
    with pytest.raises(ValueError) as caught:
        read_task_records(file, VqaRecord)
    command = str(caught.value).split("convert it: ")[1].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    written = json.loads((tmp_path / "records.jsonl").read_text())
    assert written == {"image": "a.jpg", "sentence": "s", "text": f'a kite, red{separator} and "new"'}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "an unknown folder"),
        (
            ["dataset_info.json", "state.json", "data-00000.arrow"],
            "a Hugging Face data set on disk .*mamo data build huggingface --from",
        ),
        (["0.parquet", "1.parquet"], "a folder of Parquet files; .*mamo data build parquet --from"),
        (["pairs.jsonl", "a.jpg"], r"a folder; name a file in it, such as .*pairs\.jsonl"),
        (["0.tar.gz"], "a folder of compressed files; unpack them"),
        (["a.jpg", "b.png"], "a folder of images; write a pairs file next to them"),
        (["train/0.tar", "val/0.tar"], r"a folder of folders; use the glob '.*/\*/\*\.tar'"),
        ([".hidden.tar", "._0.tar"], "an unknown folder"),
    ],
)
def test_a_folder_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    """Bug: a folder of anything is "no tar shard found"."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=rf"{folder}: no tar shard \(\*\.tar\) found; it is {message}"):
        read_pairs(folder)
    with pytest.raises(ValueError, match=r"Is a directory; name a file in it"):
        read_task_records(folder, VqaRecord)


@pytest.mark.parametrize("task", TASK_RECORDS)
def test_the_readme_lists_the_fields(task: TaskName, tmp_path: Path) -> None:
    """Bug: the README has another schema than the reader, or an example line that is not read."""
    kind = TASK_RECORDS[task]
    text = (Path(__file__).parents[2] / "mamo/data/README.md").read_text()
    table = text.split(f"| `{task}` | ")[1].split("\n\n")[0].split("\n| `")[0]
    listed = {
        name: bold == "**" for bold, name in re.findall(r"(\*\*)?`(\w+)`(?=[^|]*\|[^|]*\|)", table) if name != "null"
    }
    fields = {name: field.is_required() for name, field in kind.model_fields.items()}
    assert {name: listed.get(name) for name in fields} == fields
    (example,) = re.findall(rf"task `{task}` \| `(.*)` \|", text)
    (tmp_path / "a.jsonl").write_text(example)
    assert len(read_task_records(tmp_path / "a.jsonl", kind)) == 1


def coco(folder: Path, n: int = 2, **over: Any) -> Path:
    images = [{"id": k, "file_name": f"COCO_val2014_{k}.jpg", "width": 3} for k in range(n)]
    annotations = [{"image_id": k % n, "id": k, "caption": f"caption {k}"} for k in range(5)]
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations, **over}))
    return file


def test_cocos_captions_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the commonest caption file is "a Karpathy file needs a split out of None"."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    file = coco(tmp_path / "annotations")
    first, second = read_pairs(file)
    assert first.captions == ("caption 0", "caption 2", "caption 4")
    assert (second.captions, second.image_id) == (("caption 1", "caption 3"), "coco/1")
    assert first.image == str(tmp_path / "annotations/COCO_val2014_0.jpg")
    for k in range(2):
        (tmp_path / f"val2014/COCO_val2014_{k}.jpg").write_bytes(b"x")
    assert [Path(str(pair.image)).is_file() for pair in read_pairs(file)] == [True, True]
    assert main(["validate", str(file)]) == 0
    assert "captions: 5" in capsys.readouterr().out
    with pytest.raises(ValueError, match="split 'train' does not apply"):
        read_pairs(file, "train")
    own = coco(tmp_path, images=[{"id": "x", "file_name": "x.jpg"}], annotations=[{"image_id": "x", "caption": "y"}])
    assert read_pairs(own)[0].image_id == "captions_val2014_x"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"annotations": 3}, ":1: an entry of 'annotations' needs 'image_id' and 'caption'; is it a captions file"),
        ({"annotations": [{"image_id": 0, "bbox": [1, 2, 3, 4]}]}, ":1: an entry of 'annotations' needs"),
        ({"annotations": [{"image_id": 7, "caption": "x"}]}, "image_id 7 is not in 'images'"),
        ({"annotations": [{"image_id": [7], "caption": "x"}]}, ":1: an entry of 'annotations' needs"),
        ({"images": [{"id": 0}]}, ":1: an entry of 'images' needs 'id' and 'file_name'"),
        ({"images": 3}, ":1: an entry of 'images' needs"),
        ({"images": [{"id": 0, "file_name": "a"}, {"id": 0, "file_name": "b"}]}, ":2: .*id 0 occurs twice"),
        ({"annotations": []}, "contains no image-caption pairs"),
    ],
)
def test_a_damaged_captions_file_is_named(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    """Bug: a file of boxes is read as captions, or an image id that two pictures share is accepted."""
    with pytest.raises(ValueError, match=message):
        read_pairs(coco(tmp_path, 1, **over))


@pytest.mark.parametrize(
    "document",
    [
        {"images": [{"filename": "a.jpg"}]}, {"images": [3]}, {"images": [{"split": 3}]},
        {"images": [{"split": "val", "filename": 3, "sentences": []}]},
        {"images": [{"split": "val", "filename": "a", "filepath": None, "sentences": [{"raw": "x"}]}]},
        {"images": [{"split": "val", "filename": "a", "sentences": 3}]},
        {"images": [{"split": "val", "filename": "a", "sentences": [{"raw": None}]}]},
        {"images": [{"split": ["val"], "filename": "a", "sentences": []}, {"split": "val"}]},
    ],
)  # fmt: skip
def test_a_file_that_is_nearly_karpathys_is_named(tmp_path: Path, document: dict[str, Any]) -> None:
    """Bug: "a Karpathy file needs a split out of None; got None", or a TypeError."""
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"a\.json:") as caught:
        read_pairs(tmp_path / "a.json", "val")
    assert "None" not in str(caught.value)


TWICE = '"caption": "a kite", "caption": "a dog"'
REPEATED = {
    "a.jsonl": f'{{"image": "a.png", "caption": "a"}}\n{{"image": "b.png", {TWICE}}}\n{{"image": "c.png", {TWICE}}}\n',
    "one.jsonl": f'\n{{"image": "b.png", {TWICE}}}\n',
    "list.json": f'[{{"image": "a.png", "caption": "}}"}},\n{{"image": "b.png", {TWICE}}}]',
    "nested.jsonl": f'\n{{"image": "b.png", "caption": "a", "more": [{{{TWICE}}}]}}\n',
    "coco.json": '{"images": [{"id": 1, "file_name": "a.png"}],\n"annotations": [{"image_id": 1, ' + TWICE + "}]}",
    "whole.json": '{"images": [], "annotations": [], "images": [],\n"caption": 1, "caption": 2}',
    "escaped.jsonl": '\n{"image": "b.png", "caption": "a", "capt\\u0069on": "b"}\n',
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_key_that_occurs_twice_in_a_row_is_an_error(tmp_path: Path, name: str) -> None:
    """Bug: of two captions of a row the last wins, and the file is valid."""
    file = tmp_path / name
    file.write_text(REPEATED[name])
    key = "images" if name == "whole.json" else "caption"
    with pytest.raises(ValueError, match=rf'{name}:2: key "{key}" occurs twice in one object; keep one') as caught:
        read_pairs(file)
    assert "write one object" not in str(caught.value)
    assert ("nd 1 more" in str(caught.value) or ":3: key" in str(caught.value)) == (name == "a.jsonl")


@pytest.mark.parametrize("kind", TASK_RECORDS)
def test_a_key_that_occurs_twice_in_a_record_is_an_error(tmp_path: Path, kind: TaskName) -> None:
    """Bug: of two answers, boxes or labels of a record the last wins, and the file is valid."""
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"image": "a.png", "label": true, "label": false}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl:2: key "label" occurs twice in one object; keep one$'):
        read_task_records(file, TASK_RECORDS[kind])
