"""Two looks at pairs or records before anything is trained: `validate` reads the rows, `check` decodes every image."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mamo.data.images import BadSampleError
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import MAX_CAPTION_CHARS, clean_caption, read_pairs
from mamo.data.record_dataset import file_records, image_names
from mamo.data.records import TASK_RECORDS, GroundingRecord, TaskName, boxes_outside, read_task_records

_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Images named by a file, those that decode, and why the others do not (each named)."""

    expected: int
    found: int
    unreadable: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report: expected / found / unreadable, then each unreadable image."""
        counts = f"images: expected {self.expected}, found {self.found}, unreadable {len(self.unreadable)}"
        return [counts, *self.unreadable]

    @property
    def is_complete(self) -> bool:
        """Whether every image decodes."""
        return not self.unreadable


def validate_pairs(path: Path, split: str | None = None) -> list[str]:
    """Reads every row and returns a report with warnings. Raises ValueError, naming line and field, for a bad row."""
    records = read_pairs(path, split)
    words = [len(caption.split()) for record in records for caption in record.captions]
    report = [
        f"{path}: valid",
        f"rows: {len(records)}",
        f"images: {len({str(record.image) for record in records})}, "
        f"distinct image_id: {len({record.image_id for record in records})}",
        f"captions: {len(words)}, words {min(words)} to {max(words)}, median {statistics.median(words):g}",
    ]
    return report + _warnings(records)


def check_pairs(path: Path, split: str | None = None) -> CheckReport:
    """Decodes every distinct image once. Raises ValueError for a bad row; unreadable images are in the report."""
    images = {str(record.image): record.image for record in read_pairs(path, split)}
    unreadable = []
    for image in tqdm(images.values(), desc="check", unit="image", disable=None):
        try:
            load_image(image)
        except BadSampleError as error:
            unreadable.append(str(error))
    return CheckReport(len(images), len(images) - len(unreadable), tuple(unreadable))


def validate_records(path: Path, task: TaskName) -> list[str]:
    """Reads every record of a task and returns a report. Raises ValueError, naming line and field, for a bad one."""
    records: list[Any] = read_task_records(path, TASK_RECORDS[task])
    names = {name for record in records for name in image_names(record)}
    return [f"{path}: valid", f"{task} records: {len(records)}", f"images: {len(names)}"]


def check_records(path: Path, task: TaskName) -> CheckReport:
    """Decodes every distinct image once, and holds every box against it; what is wrong is in the report by record."""
    records, load = file_records([str(path)], TASK_RECORDS[task])
    sizes: dict[str, tuple[int, int] | None] = {}
    wrong = []
    for record in tqdm(records, desc="check", unit="record", disable=None):
        for name in image_names(record):
            if name not in sizes:
                try:
                    height, width = load(name).shape[1:]
                    sizes[name] = (width, height)
                except BadSampleError as error:
                    sizes[name] = None
                    wrong.append(f"{record.key} {getattr(record, record.key)}: {error}")
            size = sizes[name]
            if size is not None and isinstance(record, GroundingRecord):
                wrong += boxes_outside(record, *size)
    n_unreadable = sum(size is None for size in sizes.values())
    return CheckReport(len(sizes), len(sizes) - n_unreadable, tuple(wrong))


def _warnings(records: Sequence[PairRecord]) -> list[str]:
    pairs = Counter((str(record.image), caption) for record in records for caption in record.captions)
    first_line: dict[tuple[str, str], str] = {}
    repeated, empty, long = [], [], []
    for record in records:
        place = f"{record.source}:{record.line}"
        for caption in record.captions:
            key = (str(record.image), caption)
            if pairs[key] > 1 and first_line.setdefault(key, place) != place:
                repeated.append(f"{place} (first at {first_line[key]})")
            if not clean_caption(caption):
                empty.append(place)
            elif len(caption) > MAX_CAPTION_CHARS:
                long.append(place)
    return [
        *_warning(repeated, "repeat an image with the same caption"),
        *_warning(empty, "have an empty caption (the bad-sample policy decides)"),
        *_warning(long, f"have a caption over {MAX_CAPTION_CHARS} characters (it will be cut)"),
    ]


def _warning(places: list[str], text: str) -> list[str]:
    if not places:
        return []
    more = ", ..." if len(places) > _MAX_LISTED else ""
    return [f"warning: {len(places)} rows {text}: {', '.join(places[:_MAX_LISTED])}{more}"]
