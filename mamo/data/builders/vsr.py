"""Builder of VSR, visual spatial reasoning (Liu et al. 2023): sentences that are true or false of one image."""

from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, find, write_sets
from mamo.data.builders.report import BuildReport, Count, ReleaseImages, json_lines

_ITEMS = {
    ("random", "train"): 7680, ("random", "dev"): 1097, ("random", "test"): 2195,
    ("zeroshot", "train"): 3489, ("zeroshot", "dev"): 340, ("zeroshot", "test"): 1222,
}  # fmt: skip
"""Statements of the repository's files; older versions have other splits."""


def build_vsr(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `vsr-SPLIT-PART.jsonl` of each official file, grouped by relation: one text, right or not, of one image.

    `source` contains `data/splits/random/test.jsonl` and others, or `random_test.jsonl`, and the images of COCO 2017 in
    `train2017/` and `val2017/`, or in `images/`.

    Raises:
        ValueError: no such file, a row of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    sets: list[ItemSet] = []
    counts: list[Count] = []
    absent = []
    for (split, part), expected in _ITEMS.items():
        folders = [f"{folder}{split}/{part}.jsonl" for folder in ("data/splits/", "splits/", "")]
        file = find(source, *folders, f"{split}_{part}.jsonl")
        if file is None:
            absent.append(f"{split}/{part}.jsonl")
            continue
        built = ItemSet(f"vsr-{split}-{part}", images)
        for line, entry in json_lines(file):
            label, name = entry.integer("label"), entry.words("image")
            if label not in (0, 1):
                raise entry.error("label", f"must be 0 or 1, got {label}")
            folder = entry.words("image_link").rpartition("/")[0].rpartition("/")[2]
            places = [f"images/{name}", f"{folder}/{name}", f"train2017/{name}", f"val2017/{name}", name]
            image = images.relative_path(*places)
            right = [(0, 0)] if label else []
            texts, group = [entry.words("caption")], entry.words("relation")
            built.add(entry, images=[image], texts=texts, right=right, group=group, id=f"{split}/{part}/{line}")
        sets.append(built)
        counts += built.counts(expected)
    if not sets:
        raise ValueError(f"{source}: contains none of {', '.join(absent)}; --from must be a folder that contains one")
    return write_sets(sets, counts, to, overwrite, absent)
