"""Builder of NLVR2 (Suhr et al., ACL 2019): official JSON Lines to `ReasoningRecord`."""

from pathlib import Path

from mamo.data.builders.report import BuildReport, Count, ReleaseImages, UniqueIds, json_lines
from mamo.data.output import OutputFolder
from mamo.data.records import ReasoningRecord, write_task_records

_SPLITS = {  # split -> (official file, number of statements)
    "train": ("train.json", 86_373),
    "dev": ("dev.json", 6_982),
    "test-p": ("test1.json", 6_967),
    "test-u": ("test2.json", 6_970),
    "balanced-dev": ("balanced_dev.json", None),
    "unbalanced-dev": ("unbalanced_dev.json", None),
    "balanced-test-p": ("balanced_test1.json", 2_316),
    "unbalanced-test-p": ("unbalanced_test1.json", 3_536),
    "balanced-test-u": ("balanced_test2.json", None),
    "unbalanced-test-u": ("unbalanced_test2.json", None),
}
_FOLDERS = ("", "data/", "nlvr2/data/")
"""Folders of the official files: the release, the folder `nlvr2` of its repository, and the repository."""


def build_nlvr2(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl`, `dev.jsonl`, `test-p.jsonl`, `test-u.jsonl` and the balanced and unbalanced subsets.

    A split is written for each official file in `source`, `source/data/` or their `balanced/` and `unbalanced/`. Two
    layouts of the images are supported: `images/train/DIRECTORY/` (the release), and flat folders `train/`, `dev/`,
    `test1/` and `test2/`, with or without `images/` before them.

    Raises:
        ValueError: no official file, a row that does not have NLVR2's format (with file and line), or an output file
            that exists while `overwrite` is False.
    """
    images, counts, absent = ReleaseImages(source, to), [], []
    with OutputFolder(to, overwrite) as output:
        for split, (name, expected) in _SPLITS.items():
            file = _find(source, name)
            if file is None:
                absent.append(name)
                continue
            records = _read(file, images)
            write_task_records(output.path(f"{split}.jsonl"), records)
            counts.append(Count(f"{split} statements", len(records), expected))
        if not counts:
            raise ValueError(f"{source}: contains none of {', '.join(name for name, _ in _SPLITS.values())}")
    return BuildReport((*counts, images.count()), tuple(absent))


def _find(source: Path, name: str) -> Path | None:
    """Return the path of an official file, None if it is missing."""
    subset = f"{name.split('_')[0]}/" if "_" in name else ""
    candidates = [source / f"{folder}{inner}{name}" for folder in _FOLDERS for inner in dict.fromkeys((subset, ""))]
    return next((file for file in candidates if file.is_file()), None)


def _read(file: Path, images: ReleaseImages) -> list[ReasoningRecord]:
    ids, records = UniqueIds(), []
    for _, entry in json_lines(file):
        identifier, label = entry.text("identifier"), entry.text("label")
        if identifier.count("-") != 3:
            raise entry.error("identifier", f"{identifier!r} is not NLVR2's split-set-pair-sentence")
        if label not in ("True", "False"):
            raise entry.error("label", f"must be 'True' or 'False', got {label!r}")
        ids.add(entry, "identifier", identifier)
        pair = identifier.rpartition("-")[0]
        folder = identifier.split("-")[0]
        folders = [f"images/{folder}", folder]
        if "directory" in entry:
            directory = entry.integer("directory")
            folders = [f"images/{folder}/{directory}", f"{folder}/{directory}", *folders]
        sides = [images.relative_path(*(f"{each}/{pair}-img{side}.png" for each in folders)) for side in (0, 1)]
        values = {"images": sides, "sentence": entry.text("sentence"), "label": label == "True"}
        records.append(entry.record(ReasoningRecord, {**values, "identifier": identifier}))
    return records
