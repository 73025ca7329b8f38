"""Builders of SugarCrepe (Hsieh et al. 2023) and SugarCrepe++ (Dumpala et al. 2024): captions and hard negatives."""

from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, coco_places, entries_by_key, group_files, write_sets
from mamo.data.builders.report import BuildReport, ReleaseImages, entries_of
from mamo.data.files import read_json

_ITEMS = {
    "add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406, "swap_att": 666,
    "swap_obj": 245,
}  # fmt: skip
"""Items of each file; older copies of `swap_obj` have 246."""
_PLUS_PLUS = {name: n for name, n in _ITEMS.items() if not name.startswith("add")}


def build_sugarcrepe(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `sugarcrepe.jsonl`, grouped by file: an image of COCO val2017, its caption and a hard negative.

    `source` contains `add_att.json` and the other six, in `data/` or itself, and the images in `val2017/`, `images/` or
    itself.

    Raises:
        ValueError: no such file, an entry of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    built, absent = ItemSet("sugarcrepe", images), list[str]()
    for group, file in group_files(source, _ITEMS, absent):
        for key, entry in entries_by_key(read_json(file), file):
            texts = [entry.words("caption"), entry.words("negative_caption")]
            image = images.relative_path(*coco_places(entry.words("filename")))
            built.add(entry, images=[image], texts=texts, right=[(0, 0)], group=group, id=f"{group}/{key}")
    return write_sets([built], built.counts(sum(_ITEMS.values()), _ITEMS), to, overwrite, absent)


def build_sugarcrepe_pp(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `sugarcrepe-pp.jsonl`: two captions that mean the same, both right, and one that is wrong.

    Layout and errors are those of `build_sugarcrepe`, with lists of entries and five files.
    """
    images = ReleaseImages(source, to)
    built, absent = ItemSet("sugarcrepe-pp", images), list[str]()
    for group, file in group_files(source, _PLUS_PLUS, absent):
        for entry in entries_of(read_json(file), "", file):
            texts = [entry.words(field) for field in ("caption", "caption2", "negative_caption")]
            image = images.relative_path(*coco_places(entry.words("filename")))
            identifier = f"{group}/{entry.integer('id')}"
            built.add(entry, images=[image], texts=texts, right=[(0, 0), (0, 1)], group=group, id=identifier)
    return write_sets([built], built.counts(sum(_PLUS_PLUS.values()), _PLUS_PLUS), to, overwrite, absent)
