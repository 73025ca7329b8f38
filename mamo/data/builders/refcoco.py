"""Builder of RefCOCO, RefCOCO+ and RefCOCOg: REFER release to `GroundingRecord`."""

import io
import pickle
from pathlib import Path
from typing import Any

from mamo.config.values import Values
from mamo.data.builders.report import BuildReport, Count, ReleaseImages, get_rows, read_json
from mamo.data.records import GroundingRecord, write_task_records


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of containers, numbers and text. It rejects all classes and functions, so the file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Reject a class or function."""
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


def build_refcoco(source: Path, to: Path) -> BuildReport:
    """Write one file a split (`train.jsonl`, `val.jsonl`, `testA.jsonl`, ...), one row a referring expression.

    `source` contains one `refs(...).p`, `instances.json`, optionally `dets.json` (proposals by image id, in ALBEF's
    format), and COCO's images in `train2014/`. `expression_id` is the release's `sent_id`.

    Raises:
        ValueError: a file does not have REFER's format, a pickle contains a class, or an annotation is missing.
    """
    found = sorted(source.glob("refs(*).p"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{source}: needs one refs(...).p file, found {names}")
    file = source / "instances.json"
    instances = read_json(file)
    boxes = {row["id"]: row["bbox"] for row in get_rows(instances, "annotations", ("id", "bbox"), file)}
    file_names = {row["id"]: row["file_name"] for row in get_rows(instances, "images", ("id", "file_name"), file)}
    proposals = read_json(source / "dets.json") if (source / "dets.json").is_file() else {}
    images = ReleaseImages(source, to)
    splits: dict[str, list[GroundingRecord]] = {}
    for ref in _read_refs(found[0]):
        if ref["ann_id"] not in boxes or ref["image_id"] not in file_names:
            raise ValueError(
                f"{found[0]}: ref_id {ref['ref_id']} has no annotation or image in {file.name}; fetch both files again"
            )
        shared = {
            "image": images.relative_path(f"train2014/{file_names[ref['image_id']]}"),
            "box_xywh": tuple(float(value) for value in boxes[ref["ann_id"]]),
            "proposals_xywh": [tuple(map(float, box[:4])) for box in proposals.get(str(ref["image_id"]), [])],
        }
        for sentence in ref["sentences"]:
            expression = {"expression_id": sentence["sent_id"], "expression": sentence["sent"]}
            splits.setdefault(ref["split"], []).append(GroundingRecord.model_validate({**shared, **expression}))
    counts = []
    for split, records in sorted(splits.items()):
        write_task_records(to / f"{split}.jsonl", records)
        counts.append(Count(f"{split} expressions", len(records)))
    return BuildReport((*counts, images.count()))


def _read_refs(file: Path) -> list[Values]:
    """Read the references of a pickle of plain values."""
    try:
        refs = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin-1").load()
    except Exception as error:  # a damaged pickle can raise any error
        raise ValueError(f"{file}: unsafe or damaged pickle: {error}; fetch the release again") from None
    return get_rows(refs, "", ("ref_id", "ann_id", "image_id", "split", "sentences"), file)
