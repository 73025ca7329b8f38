"""Two looks at a pairs file before anything is trained: `validate` reads the rows, `check` decodes every image."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mamo.data.images import BadSample
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import load_image
from mamo.data.records import MAX_CAPTION_CHARS, clean_caption, read_pairs

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
        except BadSample as error:
            unreadable.append(str(error))
    return CheckReport(len(images), len(images) - len(unreadable), tuple(unreadable))


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
