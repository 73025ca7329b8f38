"""Builder of SNLI-VE (Xie et al. 2019): official JSON Lines and Flickr30k's images to `EntailmentRecord`."""

from pathlib import Path

from mamo.data.builders.report import BuildReport, Count, ReleaseImages, UniqueIds, json_lines
from mamo.data.output import OutputFolder
from mamo.data.records import ENTAILMENT_LABELS, EntailmentRecord, write_task_records

_SPLITS = {  # split -> (official file, number of sentences)
    "train": ("snli_ve_train.jsonl", 529_527),
    "dev": ("snli_ve_dev.jsonl", 17_858),
    "test": ("snli_ve_test.jsonl", 17_901),
}
_FOLDERS = ("flickr30k_images/", "flickr30k-images/", "Flickr30K/images/", "images/", "")
"""Folders of Flickr30k's images in the release."""


def build_snli_ve(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl`, `dev.jsonl` and `test.jsonl`, for each official file in `source`.

    The sentence is the official `sentence2`, the premise is the image `Flickr30K_ID`; `sentence1`, a caption of the
    image, is not read. Images are in `flickr30k_images/`, `flickr30k-images/`, `images/` or `source` itself.

    Raises:
        ValueError: no official file, a row that does not have SNLI-VE's format (with file and line), or an output file
            that exists while `overwrite` is False.
    """
    images, counts, absent = ReleaseImages(source, to), [], []
    with OutputFolder(to, overwrite) as output:
        for split, (name, expected) in _SPLITS.items():
            if not (source / name).is_file():
                absent.append(name)
                continue
            records = _read(source / name, images)
            write_task_records(output.path(f"{split}.jsonl"), records)
            counts.append(Count(f"{split} sentences", len(records), expected))
        if not counts:
            raise ValueError(f"{source}: contains none of {', '.join(name for name, _ in _SPLITS.values())}")
    return BuildReport((*counts, images.count()), tuple(absent))


def _read(file: Path, images: ReleaseImages) -> list[EntailmentRecord]:
    ids, records = UniqueIds(), []
    path_of: dict[str, str] = {}
    for _, entry in json_lines(file):
        label, picture, pair_id = entry.text("gold_label"), entry.words("Flickr30K_ID"), entry.words("pairID")
        if label not in ENTAILMENT_LABELS:
            raise entry.error("gold_label", f"must be one of {', '.join(ENTAILMENT_LABELS)}, got {label!r}")
        ids.add(entry, "pairID", pair_id)
        if picture not in path_of:  # about eighteen sentences an image
            path_of[picture] = images.relative_path(*(f"{folder}{picture}.jpg" for folder in _FOLDERS))
        values = {"image": path_of[picture], "sentence": entry.words("sentence2"), "label": label, "pair_id": pair_id}
        records.append(entry.record(EntailmentRecord, values))
    return records
