"""Task records: what is read back, and that every mistake is told with its line and key."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mamo.data.records import (
    GroundingRecord,
    ReasoningRecord,
    VqaRecord,
    image_path,
    read_task_records,
    write_task_records,
)
from mamo.data.validate import check_records, validate_records

VQA = {"image": "a.jpg", "question_id": 1, "question": "what?", "answers": ["x", "y"]}
REASONING = {"images": ["a.jpg", "b.jpg"], "sentence": "s", "label": False, "identifier": "dev-1-0-0"}
GROUNDING = {"image": "a.jpg", "expression_id": 4, "expression": "the kite", "box_xywh": [1.5, 2, 3, 4]}


@pytest.mark.parametrize(
    ("kind", "row"), [(VqaRecord, VQA), (ReasoningRecord, REASONING), (GroundingRecord, GROUNDING)]
)
def test_records_survive_their_file(tmp_path: Path, kind: type, row: dict[str, Any]) -> None:
    """Bug: a label that turns into text, a box that loses its fraction, a default that is not restored."""
    file = tmp_path / "folder" / "records.jsonl"
    record = kind.model_validate_json(json.dumps(row))
    write_task_records(file, [record])
    assert read_task_records(file, kind) == [record]
    assert json.loads(file.read_text()) == row
    name = row["image"] if "image" in row else row["images"][0]
    assert image_path(file, name) == tmp_path / "folder" / "a.jpg"


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (VqaRecord, [VQA, {**VQA, "question": " "}], r":2: question: String should match"),
        (VqaRecord, [VQA, VQA], r":2: question_id 1 occurs twice"),
        (VqaRecord, [{**VQA, "question_id": "1"}], r":1: question_id: Input should be a valid integer"),
        (VqaRecord, [{**VQA, "anwsers": []}], r":1: anwsers: Extra inputs are not permitted"),
        (ReasoningRecord, [{**REASONING, "label": "False"}], r":1: label: Input should be a valid boolean"),
        (ReasoningRecord, [{**REASONING, "images": ["a"] * 3}], r":1: images: List should have at most 2 items"),
        (GroundingRecord, [{**GROUNDING, "box_xywh": [1, 2, 0, 4]}], r":1: box_xywh.2: Input should be greater than 0"),
        (
            GroundingRecord,
            [{"image": "a"}],
            r"2 problem\(s\): .*:1: expression_id: Field required; .*:1: expression: F",
        ),
    ],
)
def test_mistakes_are_told(tmp_path: Path, kind: type, rows: list[object], message: str) -> None:
    """Bug: a bad row becomes an example, or one mistake hides the others."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_task_records(file, kind)


def test_a_sentence_may_hold_odd_line_ends(tmp_path: Path) -> None:
    """Bug: a row is cut in two at a character that ends a line for Python and not for JSON."""
    file = tmp_path / "records.jsonl"
    record = VqaRecord.model_validate({**VQA, "question": "one\u2028two\u2029three\u0085four?"})
    write_task_records(file, [record])
    assert read_task_records(file, VqaRecord) == [record]


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    """Bug: a codec's error that says nothing of what to do."""
    file = tmp_path / "records.jsonl"
    file.write_bytes(json.dumps({**VQA, "question": "grün?"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"records\.jsonl: not UTF-8 text .*; convert it"):
        read_task_records(file, VqaRecord)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    """Bug: an empty evaluation passes as 0 of 0."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{\n")
    for name, message in (("empty", "no records"), ("broken", ":1: Invalid JSON"), ("absent", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_task_records(tmp_path / f"{name}.jsonl", VqaRecord)


def test_check_names_the_record_of_a_missing_image_and_of_a_box_outside(tmp_path: Path) -> None:
    """Bug: found out hours later in a loader process, or scored in silence."""
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "expression_id": 1, "expression": "it", "box_xywh": [0, 0, 40, 20]},
        {"image": "a.png", "expression_id": 2, "expression": "it", "box_xywh": [0, 0, 20, 40]},
        {"image": "b.png", "expression_id": 3, "expression": "it", "proposals_xywh": [[0, 0, 9, 9]]},
        {"image": "b.png", "expression_id": 4, "expression": "it"},
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert validate_records(file, "grounding")[1:] == ["grounding records: 4", "images: 2"]
    report = check_records(file, "grounding")
    assert (report.expected, report.found, report.is_complete) == (2, 1, False)
    outside, missing = report.unreadable
    assert "expression_id 2 (" in outside
    assert "is not inside its image of 40 x 20 px" in outside
    assert missing.startswith(f"expression_id 3: {tmp_path}/b.png")
