"""Records of the downstream tasks: JSON Lines (UTF-8), one object a line, with paths relative to the file's folder.

    VQA        {"image", "question_id", "question", "answers": [...], "answer_type", "question_type"}
    reasoning  {"images": [one or two], "sentence", "label", "identifier"}
    grounding  {"image", "expression_id", "expression", "box_xywh", "proposals_xywh": [...], "foil"}

Boxes are (x, y, width, height) in pixels of the image. `answers` has one or more entries, ten in VQA v2
(`mamo.evaluation.metrics.vqa` defines the score with fewer). It is empty if the split has no public answers. `box_xywh`
is null in weakly-supervised training. `foil` is an expression that matches nothing in the image, "" if none is known.
"""

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from mamo.data.errors import ErrorCollector
from mamo.data.pairs_reader import read_lines, write_json_lines

_ROUNDING_PX = 1.0
"""COCO's boxes may exceed the image by less than a pixel."""
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]
Side = Annotated[float, Field(gt=0)]
Box = tuple[float, float, Side, Side]
"""(x, y, width, height) in pixels"""


class TaskRecord(BaseModel):
    """Base class of records. Types are strict and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    key: ClassVar[str]
    """Name of the field that is unique in a file."""


class VqaRecord(TaskRecord):
    """A question about an image, with the answers of its annotators."""

    key: ClassVar[str] = "question_id"
    image: Words
    question_id: int
    question: Words
    answers: list[str] = []
    answer_type: str = ""
    question_type: str = ""


class ReasoningRecord(TaskRecord):
    """A sentence about one image or two images (left, right), and whether it is true."""

    key: ClassVar[str] = "identifier"
    images: Annotated[list[Words], Field(min_length=1, max_length=2)]
    sentence: Words
    label: bool
    identifier: Words


class GroundingRecord(TaskRecord):
    """A phrase that refers to one object of an image."""

    key: ClassVar[str] = "expression_id"
    image: Words
    expression_id: int
    expression: Words
    box_xywh: Box | None = None
    proposals_xywh: list[Box] = []
    foil: str = ""


TaskName = Literal["vqa", "reasoning", "grounding"]
TASK_RECORDS: dict[TaskName, type[VqaRecord | ReasoningRecord | GroundingRecord]] = {
    "vqa": VqaRecord,
    "reasoning": ReasoningRecord,
    "grounding": GroundingRecord,
}
Record = TypeVar("Record", bound=TaskRecord)


def read_task_records(path: Path, kind: type[Record]) -> list[Record]:
    """Read a file of one kind of record. Image paths are not changed; `image_path` makes them absolute.

    Raises:
        ValueError: bad rows (the first ten errors and the number of others, each with file, line, key and reason),
            a repeated key, or a file that cannot be read or is empty.
    """
    records: dict[object, Record] = {}
    errors = ErrorCollector(path)
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = kind.model_validate_json(line)
        except ValidationError as error:
            for detail in error.errors():
                errors.add(number, _format_error(detail))
            continue
        key = getattr(record, kind.key)
        if key in records:
            errors.add(number, f"{kind.key} {key} occurs twice")
        records.setdefault(key, record)
    errors.raise_if_any()
    if not records:
        raise ValueError(f"{path}: contains no records")
    return list(records.values())


def _format_error(detail: ErrorDetails) -> str:
    """Format an error of pydantic as "KEY: REASON"."""
    key = ".".join(str(part) for part in detail["loc"])
    return f"{key}: {detail['msg']}" if key else detail["msg"]


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
