"""Builder of What'sUp (Kamath et al. 2023): one relation of two objects among four, in photos taken for it."""

import re
from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, coco_places, find, is_texts, write_sets
from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, entries_of
from mamo.data.files import brief, read_json

_CONTROLLED = {"A": ("controlled_images_dataset.json", 412), "B": ("controlled_clevr_dataset.json", 408)}
"""File and remembered number of items of each part; the numbers are not verified."""
_OTHERS = {
    "whatsup-coco": {"one object": "coco_qa_one_obj.json", "two objects": "coco_qa_two_obj.json"},
    "whatsup-gqa": {"one object": "vg_qa_one_obj.json", "two objects": "vg_qa_two_obj.json"},
}
_IMAGES = {"whatsup-coco": 2687, "whatsup-gqa": 1451}
_RELATION = re.compile(
    r"(?P<first>[^_]+)_(?P<relation>left|right|on|under|in-front|in_front|behind)\w*_(?P<last>[^_]+)"
)
_PAIR = {"left": "left-right", "right": "left-right", "on": "on-under", "under": "on-under"}


def build_whatsup(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `whatsup.jsonl` (own photos, A and B), `whatsup-coco.jsonl` and `whatsup-gqa.jsonl`.

    `source` contains the official JSON files, in `data/` or itself, the photos at the paths that these name, and the
    images of COCO val2017 in `val2017/` and of GQA in `vg_images/`. In A and B the four photos of two objects are a set
    (`four`), and those of opposite relations are one (`pair`).

    Raises:
        ValueError: no such file, an entry of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    own = ItemSet("whatsup", images)
    counts: list[Count] = []
    absent = []
    for part, (name, remembered) in _CONTROLLED.items():
        file = find(source, f"data/{name}", name)
        if file is None:
            absent.append(name)
            continue
        before = len(own.items)
        for number, entry in enumerate(entries_of(read_json(file), "", file)):
            _add_photo(own, entry, part, number)
        counts.append(Count(f"whatsup {part} items ({remembered} unverified)", len(own.items) - before))
    sets = [own] if own.items else []
    counts += own.counts() if own.items else []
    for name, files in _OTHERS.items():
        built = ItemSet(name, images)
        for group, official in files.items():
            file = find(source, f"data/{official}", official)
            if file is None:
                absent.append(official)
            else:
                _add_rows(built, file, group)
        sets += [built] if built.items else []
        counts += built.counts(note=f"{_IMAGES[name]:,} images, unverified") if built.items else []
    if not sets:
        raise ValueError(f"{source}: contains none of {', '.join(absent)}; --from must be a folder that contains one")
    return write_sets(sets, counts, to, overwrite, absent)


def _add_photo(built: ItemSet, entry: Entry, part: str, number: int) -> None:
    name, options = entry.words("image_path"), entry.value.get("caption_options")
    if not is_texts(options):
        raise entry.error("caption_options", f"must be a list of texts, got {brief(options)}")
    image = built.images.relative_path(name, name.removeprefix("data/"), f"data/{name}")
    bound = {}
    if found := _RELATION.fullmatch(Path(name).stem):
        four = f"{part} {found['first']} {found['last']}"
        bound = {"pair": f"{four} {_PAIR.get(found['relation'], 'front-behind')}", "four": four}
    built.add(entry, images=[image], texts=options, right=[(0, 0)], group=part, id=f"{part}/{number}", set=bound)


def _add_rows(built: ItemSet, file: Path, group: str) -> None:
    """Add rows [image id, right text, wrong text]."""
    rows = read_json(file)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must be a list of rows, got {brief(rows)}; is it the official file?")
    for number, row in enumerate(rows):
        place = f"{file}: entry {number}"
        if not isinstance(row, list) or len(row) != 3 or not is_texts(row[1:]):
            raise ValueError(f"{place}: must be [image id, right text, wrong text], got {brief(row)}")
        identifier = str(row[0])
        places = [f"vg_images/{identifier}.jpg", f"images/{identifier}.jpg"]
        if built.name == "whatsup-coco":
            places = coco_places(f"{identifier.zfill(12)}.jpg")
        entry = Entry({"row": row}, place)
        image = built.images.relative_path(*places)
        built.add(entry, images=[image], texts=row[1:], right=[(0, 0)], group=group, id=f"{group}/{number}")
