"""Builder of RefCOCO, RefCOCO+ and RefCOCOg: REFER release to `GroundingRecord`."""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamo.data.builders.captions import FOLDER_HINT
from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, UniqueIds, box, entries_of
from mamo.data.files import read_bytes, read_json
from mamo.data.output import OutputFolder
from mamo.data.records import GroundingRecord, write_task_records

DEFAULT_SPLIT_BY = "unc"
_MAX_PICKLE_BYTES = 2**31
_EXPECTED = {  # (data set, --split-by) -> number of expressions of each split
    ("refcoco+", "unc"): {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
    ("refcocog", "umd"): {"train": 80_512, "val": 4_896, "test": 9_602},
    ("refcocog", "google"): {"train": 85_474, "val": 9_536},
    ("refcoco", "unc"): {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
}


class _UnsafeError(Exception):
    """A class or function in a pickle."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of containers, numbers and text. It rejects all classes and functions, so the file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Reject a class or function."""
        raise _UnsafeError(f"it contains {module}.{name}")


def build_refcoco(source: Path, to: Path, overwrite: bool = False, split_by: str | None = None) -> BuildReport:
    """Write one file a split (`train.jsonl`, `val.jsonl`, `testA.jsonl`, ...), one row a referring expression.

    `source` contains `refs(SPLIT_BY).p`, `instances.json`, optionally `dets.json` (proposals by image id, in ALBEF's
    format), and COCO's images in `train2014/`. `expression_id` is the release's `sent_id`.

    Args:
        source: the release.
        to: folder to write.
        overwrite: whether existing files may be replaced.
        split_by: who made the splits: unc, google or umd. By default unc, or the only one in the release.

    Raises:
        ValueError: a file does not have REFER's format, a pickle contains a class, an annotation is missing, or an
            output file exists while `overwrite` is False.
    """
    file, split_by = _choose(source, split_by)
    listed, images = source / "instances.json", ReleaseImages(source, to)
    instances = read_json(listed, FOLDER_HINT)
    boxes = {entry.integer("id"): entry for entry in entries_of(instances, "annotations", listed)}
    names = {entry.integer("id"): entry.words("file_name") for entry in entries_of(instances, "images", listed)}
    proposals = _proposals(source / "dets.json")
    ids = UniqueIds()
    splits: dict[str, list[GroundingRecord]] = {}
    for entry in entries_of(_unpickle(file), "", file):
        split, annotation, image = entry.text("split"), entry.integer("ann_id"), entry.integer("image_id")
        if not re.fullmatch(r"[A-Za-z0-9_]{1,32}", split, re.ASCII):
            raise entry.error("split", f"{split[:60]!r} is not the name of a split")
        if annotation not in boxes or image not in names:
            raise ValueError(
                f"{entry.place}: ref_id {entry.integer('ref_id')} has no annotation or image in {listed.name}; "
                "fetch both files again"
            )
        shared = {
            "image": images.relative_path(f"train2014/{names[image]}"),
            "box_xywh": boxes[annotation].box("bbox"),
            "proposals_xywh": proposals.get(str(image), []),
        }
        for sentence in entry.entries("sentences"):
            number = sentence.integer("sent_id")
            ids.add(sentence, "sent_id", number)
            values = {**shared, "expression_id": number, "expression": sentence.text("sent")}
            splits.setdefault(split, []).append(sentence.record(GroundingRecord, values))
    with OutputFolder(to, overwrite) as output:
        for split, records in splits.items():
            write_task_records(output.path(f"{split}.jsonl"), records)
    found = {split: len(records) for split, records in splits.items()}
    expected = _expected(source, split_by, found)
    counts = [
        Count(f"{split} expressions", found.get(split, 0), expected.get(split)) for split in sorted({*found, *expected})
    ]
    return BuildReport((*counts, images.count()))


def _choose(source: Path, split_by: str | None) -> tuple[Path, str]:
    """Return the file of references and the name of its splits."""
    found = {file.name[len("refs(") : -len(").p")]: file for file in sorted(source.glob("refs(*).p"))}
    names = ", ".join(file.name for file in found.values()) or "none"
    chosen = split_by or (DEFAULT_SPLIT_BY if DEFAULT_SPLIT_BY in found or len(found) != 1 else next(iter(found)))
    if chosen not in found:
        choice = f"choose one with --split-by {' or '.join(found)}" if found else "fetch the release"
        raise ValueError(f"{source}: needs refs({chosen}).p, found {names}; {choice}")
    return found[chosen], chosen


def _expected(source: Path, split_by: str, found: Mapping[str, int]) -> dict[str, int]:
    """Return the published counts: of the data set that the folder is named after, else of the nearest one."""
    candidates = {name: counts for (name, by), counts in _EXPECTED.items() if by == split_by}
    named = next((name for name in candidates if name in source.absolute().name.lower()), None)
    if named is None:
        named = min(
            candidates,
            key=lambda name: sum(abs(found.get(split, 0) - n) for split, n in candidates[name].items()),
            default=None,
        )
    return {} if named is None else candidates[named]


def _proposals(file: Path) -> dict[str, list[tuple[float, ...]]]:
    """Read ALBEF's detections: boxes by image id; empty if there is no file."""
    if not file.is_file():
        return {}
    document = Entry(read_json(file), str(file))
    found = {}
    for key, boxes in document.value.items():
        if not isinstance(boxes, list):
            raise ValueError(f"{file}: entry {key}: must be a list of boxes; is it ALBEF's dets.json?")
        found[str(key)] = [box(item, f"{file}: entry {key}: [{number}]") for number, item in enumerate(boxes)]
    return found


def _unpickle(file: Path) -> object:
    """Read a pickle of plain values."""
    try:
        return _PlainUnpickler(io.BytesIO(read_bytes(file, _MAX_PICKLE_BYTES)), encoding="latin-1").load()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise any error
        reason = error if isinstance(error, _UnsafeError) else "it is not a pickle of lists, numbers and texts"
        raise ValueError(f"{file}: unsafe or damaged pickle: {reason}; fetch the release again") from None
