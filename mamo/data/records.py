"""Records of the downstream tasks: JSON Lines (UTF-8), one object a line, with paths relative to the file's folder.

    VQA        {"image", "question_id", "question", "answers": [...], "multiple_choice_answer", "answer_type",
                "question_type"}
    reasoning  {"images": [one or two], "sentence", "label", "identifier"}
    grounding  {"image", "expression_id", "expression", "box_xywh", "proposals_xywh": [...], "foil"}
    entailment {"image", "sentence", "label", "pair_id"}

Boxes are (x, y, width, height) in pixels of the image. `answers` has one or more entries, ten in VQA v2
(`mamo.evaluation.metrics.vqa` defines the score with fewer). It is empty if the split has no public answers. `box_xywh`
is null in weakly-supervised training. `foil` is an expression that matches nothing in the image, "" if none is known.
Other fields are ignored, with a line in the log; blank lines are skipped.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from mamo.data.errors import ErrorCollector, UnknownFields, json_rows
from mamo.data.files import brief
from mamo.data.formats import name_table
from mamo.data.pairs_reader import read_lines, write_json_lines

_ROUNDING_PX = 1.0
"""COCO's boxes may exceed the image by less than a pixel."""
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]
_Place = Annotated[float, Strict()]
_Side = Annotated[float, Strict(), Field(gt=0)]
Box = Annotated[tuple[_Place, _Place, _Side, _Side], Strict(False)]
"""(x, y, width, height) in pixels; read from a list"""
_BOX = "[x, y, width, height] in pixels, with width and height above 0"
_PATH = "a path relative to this file"
_TEXT = "a text that is not blank"
_TYPE = "a text by which the report is split"


class TaskRecord(BaseModel):
    """Base class of records. Types are strict and unknown keys are errors; a description says what a value must be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    key: ClassVar[str]
    """Name of the field that is unique in a file."""


class VqaRecord(TaskRecord):
    """A question about an image, with the answers of its annotators."""

    key: ClassVar[str] = "question_id"
    image: Words = Field(description=_PATH)
    question_id: int = Field(description="an integer")
    question: Words = Field(description=_TEXT)
    answers: list[str] = Field([], description="a list of texts")
    multiple_choice_answer: str = Field("", description="a text, the commonest answer")
    answer_type: str = Field("", description=_TYPE)
    question_type: str = Field("", description=_TYPE)


class ReasoningRecord(TaskRecord):
    """A sentence about one image or two images (left, right), and whether it is true."""

    key: ClassVar[str] = "identifier"
    images: Annotated[list[Words], Field(min_length=1, max_length=2)] = Field(
        description="a list of one or two paths relative to this file"
    )
    sentence: Words = Field(description=_TEXT)
    label: bool = Field(description="true or false")
    identifier: Words = Field(description="a text that no other record has")


class GroundingRecord(TaskRecord):
    """A phrase that refers to one object of an image."""

    key: ClassVar[str] = "expression_id"
    image: Words = Field(description=_PATH)
    expression_id: int = Field(description="an integer")
    expression: Words = Field(description=_TEXT)
    box_xywh: Box | None = Field(None, description=f"{_BOX}, or null")
    proposals_xywh: list[Box] = Field([], description=f"a list of boxes {_BOX}")
    foil: str = Field("", description="a text")


EntailmentLabel = Literal["contradiction", "neutral", "entailment"]
ENTAILMENT_LABELS: tuple[EntailmentLabel, ...] = get_args(EntailmentLabel)
"""In the order of ALBEF's classes 0, 1 and 2."""


class EntailmentRecord(TaskRecord):
    """A sentence about an image, and whether the image entails it, contradicts it, or neither (SNLI-VE)."""

    key: ClassVar[str] = "pair_id"
    image: Words = Field(description=_PATH)
    sentence: Words = Field(description=_TEXT)
    label: EntailmentLabel = Field(description=f"one of {', '.join(ENTAILMENT_LABELS)}")
    pair_id: Words = Field(description="a text that no other record has")


TaskName = Literal["vqa", "reasoning", "grounding", "entailment"]
TASK_RECORDS: dict[TaskName, type[VqaRecord | ReasoningRecord | GroundingRecord | EntailmentRecord]] = {
    "vqa": VqaRecord,
    "reasoning": ReasoningRecord,
    "grounding": GroundingRecord,
    "entailment": EntailmentRecord,
}
Record = TypeVar("Record", bound=TaskRecord)


def read_task_records(path: Path, kind: type[Record]) -> list[Record]:
    """Read a file of one kind of record. Image paths are not changed; `image_path` makes them absolute.

    Raises:
        ValueError: bad rows (the first ten errors and the number of others, each with file, line, key and reason),
            a repeated key, or a file that cannot be read or is empty.
    """
    records: dict[object, Record] = {}
    first_line: dict[object, int] = {}
    errors = ErrorCollector(path)
    lines = read_lines(path)
    table = name_table(path, "\n".join(lines[:20]))
    if table:
        raise ValueError(f"{path}: {table}")
    wanted = field_descriptions(kind)
    fields = UnknownFields(wanted, [name for name, field in kind.model_fields.items() if field.is_required()])
    for number, row in json_rows(lines, errors):
        found = _record_or_errors(kind, row, fields)
        if isinstance(found, list):
            for text in found:
                errors.add(number, text)
            continue
        key = getattr(found, kind.key)
        if key in records:
            errors.add(number, f"{kind.key} {brief(key)} occurs twice, first in line {first_line[key]}")
        records.setdefault(key, found)
        first_line.setdefault(key, number)
    errors.raise_if_any()
    if not records:
        raise ValueError(f"{path}: contains no records")
    fields.log(path)
    return list(records.values())


@functools.cache
def field_descriptions(kind: type[TaskRecord]) -> dict[str, str]:
    """Return what the value of each field of a record must be."""
    return {name: str(field.description) for name, field in kind.model_fields.items()}


def _record_or_errors(kind: type[Record], row: object, fields: UnknownFields) -> Record | list[str]:
    """Return the record of a parsed row, or its errors."""
    if not isinstance(row, dict):
        return [f"must be a JSON object with fields {', '.join(fields.known)}, got {brief(row)}"]
    errors = fields.check(row)
    is_known = row.keys() <= fields.known.keys()
    known = row if is_known else {name: value for name, value in row.items() if name in fields.known}
    try:
        record = kind.model_validate(known)
    except ValidationError as error:
        return [*errors, *describe_errors(error, kind, known)]
    return errors or record


def describe_errors(error: ValidationError, kind: type[TaskRecord], values: Mapping[str, Any]) -> list[str]:
    """Return a message for each field of a record that has a wrong value; missing fields are left out."""
    names = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors() if detail["type"] != "missing")
    wanted = field_descriptions(kind)
    return [f"field '{name}' must be {wanted[name]}, got {brief(values[name])}" for name in names]


def boxes_outside(record: GroundingRecord, width: int, height: int) -> list[str]:
    """Return a message for each box of the record that exceeds an image of this size by a pixel or more."""
    boxes = [*([] if record.box_xywh is None else [record.box_xywh]), *record.proposals_xywh]
    return [
        f"expression_id {record.expression_id} ({record.image}): box {box} is not inside its image of "
        f"{width} x {height} px; use x, y, width, height in pixels of the image"
        for box in boxes
        if min(box[:2]) < -_ROUNDING_PX
        or box[0] + box[2] > width + _ROUNDING_PX
        or box[1] + box[3] > height + _ROUNDING_PX
    ]


def whole_pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom of the pixels that a box covers, the latter two exclusive; None for none."""
    x, y, w, h = box
    left, top = max(int(x), 0), max(int(y), 0)
    right, bottom = min(int(x + w), width), min(int(y + h), height)
    return None if left >= right or top >= bottom else (left, top, right, bottom)


def image_path(file: Path, name: str) -> Path:
    """Return the absolute path of an image that is named in `file`."""
    return file.parent.absolute() / name


def relative_image_path(folder: Path, image: str) -> str:
    """Return an absolute path relative to a folder, which stays the same if both are moved."""
    name = image.removeprefix(f"{folder}{os.sep}")  # nearly always enough, and much faster than `relpath`
    return os.path.relpath(name, folder) if os.path.isabs(name) else name


def write_task_records(file: Path, records: list[Record]) -> None:
    """Write records as JSON Lines without the keys that have their default value."""
    write_json_lines(file, (record.model_dump(exclude_defaults=True) for record in records))
