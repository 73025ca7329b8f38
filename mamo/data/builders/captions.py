"""Builders of image-text pairs: COCO and Flickr30k captions in Karpathy's splits, and Visual Genome regions."""

from pathlib import Path

from mamo.config.values import Values
from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, UniqueIds, entries_of
from mamo.data.files import read_json
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import write_json_lines

_SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_EXPECTED_IMAGES = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
}
_EXPECTED_CAPTIONS = {
    "coco": {"train": 566_747, "val": 25_010, "test": 25_010},
    "flickr30k": {"train": 145_000, "val": 5_070, "test": 5_000},
}
_VG_IMAGES = 108_077
FOLDER_HINT = "; --from must be a folder that contains it"


def build_karpathy(name: str, source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl` (COCO: with restval), `val.jsonl` and `test.jsonl`, one row an image with all its captions.

    `source` contains `dataset_NAME.json` and the images: COCO's in `train2014/` and `val2014/`, Flickr30k's in
    `flickr30k-images/`. `image_id` is `coco/ID` or `flickr30k/FILE`; `mamo.data.audit` finds overlaps by it.
    `caption_id` has the `sentid` of each caption, which is COCO's caption id.

    Raises:
        ValueError: the file does not have Karpathy's format, or an output file exists and `overwrite` is False.
    """
    file = source / f"dataset_{name}.json"
    images, ids = ReleaseImages(source, to), UniqueIds()
    rows: dict[str, list[Values]] = {split: [] for split in _EXPECTED_IMAGES[name]}
    for entry in entries_of(read_json(file, FOLDER_HINT), "images", file):
        split = entry.text("split")
        if split not in _SPLIT_OF:
            raise entry.error("split", f"{entry.text('filename')} has the unknown split {split!r}")
        path, field, number = _image_of(entry, name)
        ids.add(entry, field, number)
        sentences = entry.entries("sentences")
        captions = [sentence.words("raw") for sentence in sentences]
        if not captions:
            raise entry.error("sentences", "is empty")
        row: Values = {"image": images.relative_path(path), "caption": captions, "image_id": f"{name}/{number}"}
        if all("sentid" in sentence for sentence in sentences):  # COCO's caption ids
            row["caption_id"] = [sentence.integer("sentid") for sentence in sentences]
        rows[_SPLIT_OF[split]].append(row)
    counts = []
    with OutputFolder(to, overwrite) as output:
        for split, expected in _EXPECTED_IMAGES[name].items():
            write_json_lines(output.path(f"{split}.jsonl"), rows[split])
            counts.append(Count(f"{split} images", len(rows[split]), expected))
            n_captions = sum(len(row["caption"]) for row in rows[split])
            counts.append(Count(f"{split} captions", n_captions, _EXPECTED_CAPTIONS[name][split]))
    return BuildReport((*counts, images.count()))


def _image_of(entry: Entry, name: str) -> tuple[str, str, object]:
    """Return the path of an entry's image, the field that identifies it, and its value."""
    if name == "coco":
        return f"{entry.text('filepath')}/{entry.words('filename')}", "cocoid", entry.integer("cocoid")
    return f"flickr30k-images/{entry.words('filename')}", "filename", entry.text("filename")


def build_vg(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `pairs.jsonl`: Visual Genome images with the phrases of their regions as captions.

    `source` contains `region_descriptions.json` and the images in `VG_100K/` and `VG_100K_2/`.

    Raises:
        ValueError: the file does not have Visual Genome's format, or `pairs.jsonl` exists and `overwrite` is False.
    """
    file = source / "region_descriptions.json"
    images, ids, rows, n_entries = ReleaseImages(source, to), UniqueIds(), [], 0
    for entry in entries_of(read_json(file, FOLDER_HINT), "", file):
        n_entries += 1
        number = entry.integer("id")
        ids.add(entry, "id", number)
        phrases = dict.fromkeys(region.text("phrase").strip() for region in entry.entries("regions"))
        captions = [phrase for phrase in phrases if phrase]
        if captions:
            name = images.relative_path(f"VG_100K/{number}.jpg", f"VG_100K_2/{number}.jpg")
            rows.append({"image": name, "caption": captions, "image_id": f"vg/{number}"})
    with OutputFolder(to, overwrite) as output:
        write_json_lines(output.path("pairs.jsonl"), rows)
    n_captions = sum(len(row["caption"]) for row in rows)
    listed = Count("images of the list", n_entries, _VG_IMAGES)
    return BuildReport((listed, Count("images", len(rows)), Count("captions", n_captions), images.count()))
