"""RefCOCO, RefCOCO+ and RefCOCOg, from the REFER release to `GroundingRecord`."""

import io
import pickle
from pathlib import Path
from typing import Any

from mamo.data.builders.report import BuildReport, Count, Images, read_json, rows_of
from mamo.data.records import GroundingRecord, write_task_records


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers and text; refuses every class and function, so that no code of the file runs."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def build_refcoco(source: Path, to: Path) -> BuildReport:
    """Writes one file a split (`train.jsonl`, `val.jsonl`, `testA.jsonl`, ...), one row a referring expression.

    `source` holds one `refs(...).p`, `instances.json`, optionally `dets.json` (proposals by image id, as ALBEF's), and
    COCO's images in `train2014/`. `expression_id` is the release's `sent_id`.

    Raises ValueError for files that are not REFER's, for a pickle that asks for any class, and for a reference whose
    annotation is missing.
    """
    found = sorted(source.glob("refs(*).p"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{source}: needs one refs(...).p file, found {names}")
    file = source / "instances.json"
    instances = read_json(file)
    boxes = {row["id"]: row["bbox"] for row in rows_of(instances, "annotations", ("id", "bbox"), file)}
    file_names = {row["id"]: row["file_name"] for row in rows_of(instances, "images", ("id", "file_name"), file)}
    proposals = read_json(source / "dets.json") if (source / "dets.json").is_file() else {}
    images = Images(source, to)
    splits: dict[str, list[GroundingRecord]] = {}
    for ref in _read_refs(found[0]):
        if ref["ann_id"] not in boxes or ref["image_id"] not in file_names:
            raise ValueError(f"{found[0]}: ref_id {ref['ref_id']} has no annotation or image in {file.name}")
        shared = {
            "image": images.name(f"train2014/{file_names[ref['image_id']]}"),
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


def _read_refs(file: Path) -> list[dict[str, Any]]:
    try:
        refs = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin-1").load()
    except Exception as error:  # a damaged pickle raises errors of many kinds
        raise ValueError(f"{file}: refused or damaged pickle: {error}") from None
    return rows_of(refs, "", ("ref_id", "ann_id", "image_id", "split", "sentences"), file)
