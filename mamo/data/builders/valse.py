"""Builder of VALSE (Parcalabescu et al. 2022): captions and foils of eleven instruments."""

from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, entries_by_key, group_files, write_sets
from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages
from mamo.data.files import read_json

_ITEMS = {  # instrument: items of the file, items that two of three judges accept
    "existence": (534, 505), "plurals": (1000, 851), "counting-hard": (1000, 868), "counting-small-quant": (1000, 900),
    "counting-adversarial": (756, 691), "relations": (614, 535), "action-replacement": (779, 648),
    "actant-swap": (1042, 949), "coreference-standard": (916, 708), "coreference-hard": (141, 104),
    "foil-it": (1000, 943),
}  # fmt: skip
_LEAST_JUDGES = 2
_FOLDERS = {
    "visual7w": ("visual7w",), "swig": ("SWiG",), "coco2017": ("val2017",), "coco_2017": ("val2017",),
    "foil dataset": ("val2014",), "visdial_v1.0": ("train2014", "VisualDialog_val2018"),
}  # fmt: skip
"""Folders of the images by the name of their data set in the annotations, lower case."""


def build_valse(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `valse.jsonl`, grouped by instrument: the items whose foil two of three judges found to be false.

    `source` contains `existence.json` and the other ten, in `data/` or itself. The images lie in `images/`, in `source`
    itself, or in `visual7w/`, `SWiG/`, `val2017/`, `val2014/`, `train2014/` and `VisualDialog_val2018/`.

    Raises:
        ValueError: no such file, an entry of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    built, absent, n_listed = ItemSet("valse", images), list[str](), 0
    for group, file in group_files(source, _ITEMS, absent):
        for key, entry in entries_by_key(read_json(file), file):
            n_listed += 1
            judges = Entry(entry.value.get("mturk"), f"{entry.place}: mturk")
            if judges.integer("caption") < _LEAST_JUDGES:
                continue
            texts = [entry.words("caption"), entry.words("foil")]
            image = images.relative_path(*_places(entry))
            built.add(entry, images=[image], texts=texts, right=[(0, 0)], group=group, id=f"{group}/{key}")
    listed = Count("items of the files", n_listed, sum(n for n, _ in _ITEMS.values()))
    by_group = {group: n for group, (_, n) in _ITEMS.items()}
    return write_sets([built], [listed, *built.counts(sum(by_group.values()), by_group)], to, overwrite, absent)


def _places(entry: Entry) -> list[str]:
    """Return where the image of an entry may lie."""
    name = entry.words("image_file")
    return [
        f"images/{name}",
        *(f"{folder}/{name}" for folder in _FOLDERS.get(entry.words("dataset").lower(), ())),
        name,
    ]
