"""Builders of image-text pairs: COCO and Flickr30k captions in Karpathy's splits, and Visual Genome regions."""

from pathlib import Path

from mamo.config.values import Values
from mamo.data.builders.report import BuildReport, Count, ReleaseImages, get_rows, read_json
from mamo.data.pairs_reader import write_json_lines

_SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_EXPECTED_IMAGES = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
}


def build_karpathy(name: str, source: Path, to: Path) -> BuildReport:
    """Write `train.jsonl` (COCO: with restval), `val.jsonl` and `test.jsonl`, one row an image with all its captions.

    `source` contains `dataset_NAME.json` and the images: COCO's in `train2014/` and `val2014/`, Flickr30k's in
    `flickr30k-images/`. `image_id` is `coco/ID` or `flickr30k/FILE`; `mamo.data.audit` finds overlaps by it.

    Raises:
        ValueError: the file does not have Karpathy's format.
    """
    file = source / f"dataset_{name}.json"
    images = ReleaseImages(source, to)
    rows: dict[str, list[Values]] = {split: [] for split in _EXPECTED_IMAGES[name]}
    for entry in get_rows(read_json(file), "images", ("filename", "split", "sentences"), file):
        if entry["split"] not in _SPLIT_OF:
            raise ValueError(
                f"{file}: {entry['filename']} has the unknown split {entry['split']!r}; is it the official file?"
            )
        if name == "coco":
            path, image_id = f"{entry['filepath']}/{entry['filename']}", f"coco/{entry['cocoid']}"
        else:
            path, image_id = f"flickr30k-images/{entry['filename']}", f"flickr30k/{entry['filename']}"
        captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
        row = {"image": images.relative_path(path), "caption": captions, "image_id": image_id}
        rows[_SPLIT_OF[entry["split"]]].append(row)
    counts = []
    for split, expected in _EXPECTED_IMAGES[name].items():
        write_json_lines(to / f"{split}.jsonl", rows[split])
        counts.append(Count(f"{split} images", len(rows[split]), expected))
        counts.append(Count(f"{split} captions", sum(len(row["caption"]) for row in rows[split])))
    return BuildReport((*counts, images.count()))


def build_vg(source: Path, to: Path) -> BuildReport:
    """Write `pairs.jsonl`: Visual Genome images with the phrases of their regions as captions.

    `source` contains `region_descriptions.json` and the images in `VG_100K/` and `VG_100K_2/`.

    Raises:
        ValueError: the file does not have Visual Genome's format.
    """
    file = source / "region_descriptions.json"
    images, rows = ReleaseImages(source, to), []
    for entry in get_rows(read_json(file), "", ("id", "regions"), file):
        phrases = list(dict.fromkeys(region["phrase"].strip() for region in entry["regions"]))
        captions = [phrase for phrase in phrases if phrase]
        if captions:
            name = images.relative_path(f"VG_100K/{entry['id']}.jpg", f"VG_100K_2/{entry['id']}.jpg")
            rows.append({"image": name, "caption": captions, "image_id": f"vg/{entry['id']}"})
    write_json_lines(to / "pairs.jsonl", rows)
    n_captions = sum(len(row["caption"]) for row in rows)
    return BuildReport((Count("images", len(rows)), Count("captions", n_captions), images.count()))
