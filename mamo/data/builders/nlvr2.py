"""Builder of NLVR2 (Suhr et al., ACL 2019): official JSON Lines to `ReasoningRecord`."""

import json
from pathlib import Path

from mamo.config.values import Values
from mamo.data.builders.report import BuildReport, Count, ReleaseImages
from mamo.data.pairs_reader import read_lines
from mamo.data.records import ReasoningRecord, write_task_records

_SPLITS = {  # split -> (official file, number of statements)
    "train": ("train.json", 86_373),
    "dev": ("dev.json", 6_982),
    "test-p": ("test1.json", 6_967),
    "balanced-test-p": ("balanced_test1.json", 2_316),
    "unbalanced-test-p": ("unbalanced_test1.json", 3_536),
}


def build_nlvr2(source: Path, to: Path) -> BuildReport:
    """Write `train.jsonl`, `dev.jsonl`, `test-p.jsonl` and its two subsets, for each official file in `source`.

    Two layouts of the images are supported: `images/train/DIRECTORY/` (the release), and flat folders `train/`, `dev/`
    and `test1/`, with or without `images/` before them.

    Raises:
        ValueError: no official file, or a row that does not have NLVR2's format (with file and line).
    """
    images, counts = ReleaseImages(source, to), []
    for split, (name, expected) in _SPLITS.items():
        file = source / name
        if not file.is_file():
            continue
        records = []
        for line, text in enumerate(read_lines(file), 1):
            row = _row(text, f"{file}:{line}")
            pair, _ = row["identifier"].rsplit("-", 1)
            folder = row["identifier"].split("-")[0]
            folders = [f"images/{folder}", folder]
            if "directory" in row:
                folders = [f"images/{folder}/{row['directory']}", f"{folder}/{row['directory']}", *folders]
            sides = [images.relative_path(*(f"{each}/{pair}-img{side}.png" for each in folders)) for side in (0, 1)]
            record = {"images": sides, "sentence": row["sentence"], "label": row["label"] == "True"}
            records.append(ReasoningRecord.model_validate({**record, "identifier": row["identifier"]}))
        write_task_records(to / f"{split}.jsonl", records)
        counts.append(Count(f"{split} statements", len(records), expected))
    if not counts:
        raise ValueError(f"{source}: contains none of {', '.join(name for name, _ in _SPLITS.values())}")
    return BuildReport((*counts, images.count()))


def _row(text: str, location: str) -> Values:
    """Parse and check a row. Messages begin with `location`."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{location}: not valid JSON ({error}); fetch the release again") from None
    if not isinstance(row, dict) or not all(
        isinstance(row.get(key), str) for key in ("identifier", "sentence", "label")
    ):
        raise ValueError(f"{location}: needs identifier, sentence and label; is it the official file?")
    if row["label"] not in ("True", "False") or row["identifier"].count("-") != 3:
        raise ValueError(
            f"{location}: label {row['label']!r} or identifier {row['identifier']!r} is not NLVR2's; "
            "is it the official file?"
        )
    return row
