"""Builders of ARO (Yuksekgonul et al. 2023): relations and attributes in Visual Genome, and the order of words."""

from pathlib import Path
from typing import Any

from mamo.data.builders.item_sets import ExtractedImages, ItemSet, find, is_texts, require, write_sets
from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, box, entries_of
from mamo.data.files import read_json
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import read_lines
from mamo.data.parquet import image_content, parquet_files, read_parquet

_RELATIONS, _ATTRIBUTES = 23_937, 28_748
_ORDER = {"aro-coco-order": 25_010, "aro-flickr30k-order": 5_000}
_DROPPED = "dropped_relations.txt"
_ORDER_TEXTS = ("correct_caption", "hard_text_1", "hard_text_2", "hard_text_3", "hard_text_4")


def build_aro(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `aro-relation.jsonl` and `aro-attribution.jsonl`: a box of an image, a true and a false caption.

    `source` contains `visual_genome_relation.json`, `visual_genome_attribution.json` and the images of
    `vgr_vga_images.zip` in `images/`. The paper leaves out relations that its notebook lists; where `source` contains
    that list as `dropped_relations.txt`, one a line, so does the file. Without it all relations are kept, and the file
    is named `aro-relation-all`.

    Raises:
        ValueError: no such file, an entry of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    dropped = _dropped(source)
    relation = ItemSet("aro-relation" if dropped is not None else "aro-relation-all", images)
    attribution = ItemSet("aro-attribution", images)
    file = require(source, "visual_genome_relation.json", "data/visual_genome_relation.json")
    n_relations = 0
    for number, entry in enumerate(entries_of(read_json(file), "", file)):
        n_relations += 1
        name = entry.words("relation_name")
        if name not in (dropped or ()):
            _add(relation, entry, name, number)
    counts = [Count("relations of the file", n_relations, _RELATIONS), *relation.counts()]
    sets, absent = [relation], []
    second = find(source, "visual_genome_attribution.json", "data/visual_genome_attribution.json")
    if second is None:
        absent.append("visual_genome_attribution.json")
    else:
        for number, entry in enumerate(entries_of(read_json(second), "", second)):
            pair: Any = entry.value.get("attributes")
            if not is_texts(pair):
                raise entry.error("attributes", "must be a list of two texts")
            _add(attribution, entry, " ".join(pair), number)
        sets.append(attribution)
        counts += attribution.counts(_ATTRIBUTES)
    if dropped is None:
        absent.append(f"{_DROPPED} (all relations are kept)")
    return write_sets(sets, counts, to, overwrite, absent)


def _dropped(source: Path) -> set[str] | None:
    file = source / _DROPPED
    return {line.strip() for line in read_lines(file) if line.strip()} if file.is_file() else None


def _add(built: ItemSet, entry: Entry, group: str, number: int) -> None:
    """Add an item with the box that its image is cropped to."""
    name = entry.words("image_path")
    image = built.images.relative_path(f"images/{name}", name)
    edges = box([entry.value.get(f"bbox_{side}") for side in "xywh"], f"{entry.place}: bbox_x, bbox_y, bbox_w, bbox_h")
    texts = [entry.words("true_caption"), entry.words("false_caption")]
    built.add(entry, images=[image], texts=texts, right=[(0, 0)], group=group, id=str(number), boxes={0: edges})


def build_aro_order(name: str, source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `aro-coco-order.jsonl` or `aro-flickr30k-order.jsonl`: a caption, and four orders of its words.

    The wrong orders depend on versions of libraries, so they are taken from a frozen copy: `source` contains the
    parquet files of `mteb/ARO-COCO-order`, or of its counterpart for Flickr30k. The images are written into `images/`.

    Args:
        name: `aro-coco-order` or `aro-flickr30k-order`.
        source, to, overwrite: as of `build_aro`.

    Raises:
        ValueError: no parquet file, other columns, or the output exists while `overwrite` is False.
    """
    with OutputFolder(to, overwrite) as output:
        images = ExtractedImages(source, to, output, "images")
        built = ItemSet(name, images)
        for number, (place, row) in enumerate(read_parquet(parquet_files(source), ["images", *_ORDER_TEXTS])):
            entry = Entry(row, place)
            image = images.add(image_content(_one(row["images"]), f"{place}: images", source), place)
            texts = [entry.words(field) for field in _ORDER_TEXTS]
            built.add(entry, images=[image], texts=texts, right=[(0, 0)], group="order", id=str(number))
        built.write(output)
        counts = built.counts(_ORDER[name])
    return BuildReport((*counts, images.count()))


def _one(value: object) -> object:
    """Return the first image of a list of images, or the value itself."""
    return value[0] if isinstance(value, list) and value else value
