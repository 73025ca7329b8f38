"""Validation of pairs and records before training: `validate_*` reads all rows, `check_*` decodes all images."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mamo.data.captions import CaptionKeys
from mamo.data.identity import caption_warnings, identity_warnings
from mamo.data.images import BadSampleError
from mamo.data.items import read_items
from mamo.data.judge import grounding_problems, item_box_problems, row_problems, size_of
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import MAX_CAPTION_CHARS, clean_caption, read_pairs
from mamo.data.record_dataset import file_records, image_names
from mamo.data.records import TASK_RECORDS, GroundingRecord, TaskName

_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Number of images in a file, number that decode, and one line for each problem."""

    expected: int
    found: int
    unreadable: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Format the report: the counts, then one line for each unreadable image or bad box."""
        counts = f"images: expected {self.expected}, found {self.found}, unreadable {len(self.unreadable)}"
        return [counts, *self.unreadable, *self.warnings]

    @property
    def is_complete(self) -> bool:
        """Return whether all images decode and all boxes are inside."""
        return not self.unreadable


def validate_pairs(
    path: Path, split: str | None = None, caption_keys: CaptionKeys | None = None, columns: Sequence[str] = ()
) -> list[str]:
    """Read all pairs and return a report with warnings; arguments as of `read_pairs`.

    Raises ValueError with line and field of bad rows.
    """
    records = read_pairs(path, split, caption_keys, columns)
    words = [len(caption.split()) for record in records for caption in record.captions]
    report = [
        f"{path}: valid",
        f"rows: {len(records)}",
        f"images: {len({str(record.image) for record in records})}, "
        f"distinct image_id: {len({record.image_id for record in records})}",
        f"captions: {len(words)}, words {min(words)} to {max(words)}, median {statistics.median(words):g}",
    ]
    found = [*identity_warnings([records]), *caption_warnings(records)]
    return [*report, *(f"warning: {text}" for text in found), *_warnings(records)]


def check_pairs(
    path: Path, split: str | None = None, caption_keys: CaptionKeys | None = None, columns: Sequence[str] = ()
) -> CheckReport:
    """Decode each distinct image once; unreadable images are in the report. Arguments as of `read_pairs`.

    Raises ValueError for bad rows.
    """
    images = {str(record.image): record.image for record in read_pairs(path, split, caption_keys, columns)}
    unreadable = []
    for image in tqdm(images.values(), desc="check", unit="image", disable=None):
        try:
            load_image(image)
        except BadSampleError as error:
            unreadable.append(str(error))
    return CheckReport(len(images), len(images) - len(unreadable), tuple(unreadable))


def validate_records(path: Path, task: TaskName) -> list[str]:
    """Read all records of a task and return a report. Raises ValueError with line and field of bad rows.

    The first line says what an evaluation refuses; boxes are compared with the headers of the images that are there.
    """
    records, _ = file_records([str(path)], TASK_RECORDS[task])
    names = {name for record in records for name in image_names(record)}
    refused = _refused(row_problems(records) + _box_problems(records))
    verdict = f"valid for training; {refused[0]}" if refused else "valid"
    return [f"{path}: {verdict}", f"{task} records: {len(records)}", f"images: {len(names)}"]


def validate_items(path: Path) -> list[str]:
    """Read all items of a fine-grained set and return a report. Raises ValueError with line and field of bad rows."""
    file = read_items(path)
    boxes_outside = item_box_problems(file)
    if boxes_outside:
        raise ValueError(f"{len(boxes_outside)} problem(s): {'; '.join(boxes_outside[:_MAX_LISTED])}")
    images = {name for item in file.items for name in item.images}
    groups = Counter(item.group for item in file.items)
    listed = ", ".join(f"{name} {n}" for name, n in groups.most_common(_MAX_LISTED))
    counts = [f"items: {len(file.items)}", f"images: {len(images)}", f"groups: {len(groups)} ({listed})"]
    return [f"{path}: valid", *counts, f"sha256: {file.sha256}"]


def check_items(path: Path) -> CheckReport:
    """Decode each distinct image of a file of items once. Raises ValueError for bad rows."""
    file = read_items(path)
    names = list(dict.fromkeys(name for item in file.items for name in item.images))
    unreadable = []
    for name in tqdm(names, desc="check", unit="image", disable=None):
        try:
            load_image(name)
        except BadSampleError as error:
            unreadable.append(str(error))
    return CheckReport(len(names), len(names) - len(unreadable), (*unreadable, *item_box_problems(file)))


def _box_problems(records: list[Any]) -> list[str]:
    problems: list[str] = []
    sizes: dict[str, tuple[int, int] | None] = {}
    for record in records:
        if isinstance(record, GroundingRecord):
            if record.image not in sizes:
                try:
                    sizes[record.image] = size_of(record.image)
                except BadSampleError:
                    sizes[record.image] = None
            size = sizes[record.image]
            problems += [] if size is None else grounding_problems(record, *size)
    return problems


def _refused(problems: list[str]) -> tuple[str, ...]:
    """Return a line about what training takes and an evaluation refuses, or none."""
    more = "; ..." if len(problems) > _MAX_LISTED else ""
    listed = "; ".join(problems[:_MAX_LISTED])
    return (f"an evaluation refuses it for {len(problems)} problem(s): {listed}{more}",) if problems else ()


def check_records(path: Path, task: TaskName) -> CheckReport:
    """Decode each distinct image once and check that boxes are inside; problems are in the report by record."""
    records, load = file_records([str(path)], TASK_RECORDS[task])
    sizes: dict[str, tuple[int, int] | None] = {}
    problems = []
    for record in tqdm(records, desc="check", unit="record", disable=None):
        for name in image_names(record):
            if name not in sizes:
                try:
                    height, width = load(name).shape[1:]
                    sizes[name] = (width, height)
                except BadSampleError as error:
                    sizes[name] = None
                    problems.append(f"{record.key} {getattr(record, record.key)}: {error}")
            size = sizes[name]
            if size is not None and isinstance(record, GroundingRecord):
                problems += grounding_problems(record, *size)
    n_unreadable = sum(size is None for size in sizes.values())
    return CheckReport(len(sizes), len(sizes) - n_unreadable, tuple(problems), _refused(row_problems(records)))


def _warnings(records: Sequence[PairRecord]) -> list[str]:
    """Return warnings about repeated pairs, empty captions and long captions."""
    pairs = Counter((str(record.image), caption) for record in records for caption in record.captions)
    first_line: dict[tuple[str, str], str] = {}
    repeated, empty, long = [], [], []
    for record in records:
        location = f"{record.source}:{record.line}"
        for caption in record.captions:
            key = (str(record.image), caption)
            if pairs[key] > 1 and first_line.setdefault(key, location) != location:
                repeated.append(f"{location} (first at {first_line[key]})")
            if not clean_caption(caption):
                empty.append(location)
            elif len(caption) > MAX_CAPTION_CHARS:
                long.append(location)
    return [
        *_warning(repeated, "repeat an image with the same caption"),
        *_warning(empty, "have an empty caption (the bad-sample policy decides)"),
        *_warning(long, f"have a caption over {MAX_CAPTION_CHARS} characters (it will be cut)"),
    ]


def _warning(locations: list[str], text: str) -> list[str]:
    """Return one warning with the first locations, or none."""
    if not locations:
        return []
    more = ", ..." if len(locations) > _MAX_LISTED else ""
    return [f"warning: {len(locations)} rows {text}: {', '.join(locations[:_MAX_LISTED])}{more}"]
