"""Task records: what is read back, and that every mistake is told with its line and key."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mamo.data.records import (
    EntailmentRecord,
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
ENTAILMENT = {"image": "a.jpg", "sentence": "s", "label": "neutral", "pair_id": "1"}
GROUNDING = {"image": "a.jpg", "expression_id": 4, "expression": "the kite", "box_xywh": [1.5, 2, 3, 4]}


@pytest.mark.parametrize(
    ("kind", "row"),
    [(VqaRecord, VQA), (ReasoningRecord, REASONING), (GroundingRecord, GROUNDING), (EntailmentRecord, ENTAILMENT)],
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
        (
            VqaRecord,
            [VQA, {**VQA, "question": " "}],
            r":2: field 'question' must be a text that is not blank, got \" \"",
        ),
        (VqaRecord, [VQA, VQA], r":2: question_id 1 occurs twice, first in line 1"),
        (VqaRecord, [{**VQA, "question_id": "1"}], r":1: field 'question_id' must be an integer, got \"1\""),
        (VqaRecord, [{**VQA, "question_id": True}], r":1: field 'question_id' must be an integer, got true"),
        (VqaRecord, [{**VQA, "answers": "x"}], r":1: field 'answers' must be a list of texts, got \"x\""),
        (VqaRecord, [{**VQA, "answers": [None]}], r":1: field 'answers' must be a list of texts, got \[null\]"),
        (
            VqaRecord,
            [{"image": "a.jpg", "question_id": 1, "question": "?", "anwsers": []}],
            r":1: unknown field 'anwsers' \(did you mean 'answers'\?\); rename or remove it; known fields: image, q",
        ),
        (
            VqaRecord,
            [{"image": "a.jpg", "question_id": 1, "text": "?"}],
            r"'question' is missing; .*the row has .*'text'",
        ),
        (ReasoningRecord, [{**REASONING, "label": "False"}], r":1: field 'label' must be true or false, got \"False\""),
        (
            EntailmentRecord,
            [{**ENTAILMENT, "label": "-"}],
            r":1: field 'label' must be one of contradiction, neutral, entailment, got \"-\"",
        ),
        (EntailmentRecord, [ENTAILMENT, ENTAILMENT], r":2: pair_id \"1\" occurs twice, first in line 1"),
        (ReasoningRecord, [{**REASONING, "label": 1}], r":1: field 'label' must be true or false, got 1"),
        (
            ReasoningRecord,
            [{**REASONING, "images": ["a"] * 3}],
            r":1: field 'images' must be a list of one or two paths",
        ),
        (ReasoningRecord, [{**REASONING, "images": [REASONING]}], r":1: field 'images' must be .*, got a list of 1"),
        (
            GroundingRecord,
            [{**GROUNDING, "box_xywh": [1, 2, 0, 4]}],
            r":1: field 'box_xywh' must be .*, got \[1, 2, 0, 4\]",
        ),
        (GroundingRecord, [{**GROUNDING, "box_xywh": [True, 2, 3, 4]}], r":1: field 'box_xywh' must be"),
        (GroundingRecord, [{**GROUNDING, "box_xywh": "1234"}], r":1: field 'box_xywh' must be"),
        (GroundingRecord, [{**GROUNDING, "proposals_xywh": [[1, 2, 3, 1e999]]}], r":1: field 'proposals_xywh' must be"),
        (
            GroundingRecord,
            [{**GROUNDING, "proposals_xywh": [[1, 2, 3, 10**400]]}],
            r":1: field 'proposals_xywh' must be",
        ),
        (GroundingRecord, [[GROUNDING]], r":1: must be a JSON object with fields image, expression_id"),
        (
            GroundingRecord,
            [{"image": "a"}],
            r"2 problem\(s\): .*:1: field 'expression_id' is missing; add an integer \(known fields: image, "
            r".*:1: field 'expression' is missing; add a text",
        ),
    ],
)
def test_mistakes_are_told(tmp_path: Path, kind: type, rows: list[object], message: str) -> None:
    """Bug: a bad row becomes an example, or one mistake hides the others."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_task_records(file, kind)


def test_equal_errors_are_one(tmp_path: Path) -> None:
    """Bug: thousands of rows with one mistake are a message of a page."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps({**VQA, "question_id": f"q{k}"}) + "\n" for k in range(5000)))
    with pytest.raises(ValueError) as caught:
        read_task_records(file, VqaRecord)
    assert str(caught.value) == (
        f"5000 problem(s): {file}:1: field 'question_id' must be an integer, got \"q0\" "
        "(and 4999 more like it, the last in line 5000)"
    )


def test_extra_columns_are_ignored_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a column that nothing reads makes every row an error."""
    file = tmp_path / "records.jsonl"
    rows = [{**VQA, "question_id": k, "width": 3, "license": None, "answer": "x"} for k in range(3)]
    file.write_text("\n" + "".join(json.dumps(row) + "\n \n" for row in rows) + "\n")
    with caplog.at_level("INFO"):
        assert [record.question_id for record in read_task_records(file, VqaRecord)] == [0, 1, 2]
    assert caplog.messages == [f"{file}: fields that are not read: 'width', 'license', 'answer' (in 3 rows)"]


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
    for name, message in (("empty", "no records"), ("broken", ":1: not valid JSON"), ("absent", "cannot be read")):
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
    assert validate_records(file, "grounding")[1:3] == ["grounding records: 4", "images: 2"]
    report = check_records(file, "grounding")
    assert (report.expected, report.found, report.is_complete) == (2, 1, False)
    outside, missing = report.unreadable
    assert "expression_id 2 (" in outside
    assert "is not inside its image of 40 x 20 px" in outside
    assert missing.startswith(f"expression_id 3: {tmp_path}/b.png")
