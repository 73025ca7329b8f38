"""Records of the downstream tasks: JSON Lines (UTF-8), one object a line, paths relative to the file's folder.

    VQA        {"image", "question_id", "question", "answers": [...], "answer_type", "question_type"}
    reasoning  {"images": [one or two], "sentence", "label", "identifier"}
    grounding  {"image", "expression_id", "expression", "box_xywh", "proposals_xywh": [...], "foil"}

Boxes are (x, y, width, height) in pixels of the image. `answers` has one or more, ten in VQA v2
(`mamo.evaluation.metrics.vqa` says how fewer are scored), and is empty where the split withholds them. `box_xywh` is null where
nobody may look at it (weakly-supervised training). `foil` is an expression that is true of nothing in the image, where
one is known.
"""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mamo.data.pairs_reader import lines_of, write_json_lines

_MAX_LISTED = 10
_ROUNDING_PX = 1.0
"""COCO's boxes may leave the image by less than a pixel."""
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]
Side = Annotated[float, Field(gt=0)]
Box = tuple[float, float, Side, Side]


class TaskRecord(BaseModel):
    """A strict row; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    key: ClassVar[str]
    """The field that is unique in a file."""


class VqaRecord(TaskRecord):
    """A question about an image and what people answered."""

    key: ClassVar[str] = "question_id"
    image: Words
    question_id: int
    question: Words
    answers: list[str] = []
    answer_type: str = ""
    question_type: str = ""


class ReasoningRecord(TaskRecord):
    """A sentence about one image or a pair of images, left to right, and whether it is true."""

    key: ClassVar[str] = "identifier"
    images: Annotated[list[Words], Field(min_length=1, max_length=2)]
    sentence: Words
    label: bool
    identifier: Words


class GroundingRecord(TaskRecord):
    """A phrase that means one object of an image."""

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
    """Reads a file of one kind of record, `image` and `images` as they stand (`image_path` joins them).

    Raises ValueError with every bad row (the first ten and the count): file, line, key and what is wrong with it; for
    a key that occurs twice; and for a file that cannot be read or is empty.
    """
    records: dict[object, Record] = {}
    problems: list[str] = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            record = kind.model_validate_json(line)
        except ValidationError as error:
            problems += [f"{path}:{number}: {text}" for text in map(_told, error.errors())]
            continue
        identity = getattr(record, kind.key)
        if identity in records:
            problems.append(f"{path}:{number}: {kind.key} {identity} occurs twice")
        records.setdefault(identity, record)
    if problems:
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise ValueError(f"{len(problems)} problem(s): " + "; ".join(problems[:_MAX_LISTED]) + more)
    if not records:
        raise ValueError(f"{path}: holds no record")
    return list(records.values())


def _told(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    return f"{key}: {problem['msg']}" if key else str(problem["msg"])


def boxes_outside(record: GroundingRecord, width: int, height: int) -> list[str]:
    """A message for the gold box and each proposal that leaves an image of this size by a pixel or more."""
    boxes = [*([] if record.box_xywh is None else [record.box_xywh]), *record.proposals_xywh]
    return [
        f"expression_id {record.expression_id} ({record.image}): box {box} leaves its image of {width} x {height} px; "
        "give x, y, width, height in its pixels"
        for box in boxes
        if min(box[:2]) < -_ROUNDING_PX
        or box[0] + box[2] > width + _ROUNDING_PX
        or box[1] + box[3] > height + _ROUNDING_PX
    ]


def image_path(file: Path, name: str) -> Path:
    """Where an image named in `file` lies."""
    return file.parent.absolute() / name


def relative_image_path(folder: Path, image: str) -> str:
    """An absolute path as seen from a folder: what stays where both are moved together."""
    name = image.removeprefix(f"{folder}{os.sep}")  # nearly always all, and far faster than the general way
    return os.path.relpath(name, folder) if os.path.isabs(name) else name


def write_task_records(file: Path, records: list[Record]) -> None:
    """Writes records as JSON Lines, keys that have their default left out."""
    write_json_lines(file, (record.model_dump(exclude_defaults=True) for record in records))
