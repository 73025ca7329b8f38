"""Builder of Winoground (Thrush et al. 2022): two images and two captions of the same words."""

from pathlib import Path

from mamo.data.builders.item_sets import ItemSet, require, write_sets
from mamo.data.builders.report import BuildReport, ReleaseImages, json_lines

_ITEMS = {"Object": 141, "Relation": 233, "Both": 26}


def build_winoground(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `winoground.jsonl`, grouped by tag: caption k belongs to image k.

    `source` contains `examples.jsonl`, in `data/` or itself, and the images of `images.zip` in `images/`.

    Raises:
        ValueError: no such file, a row of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    built = ItemSet("winoground", images)
    for _, entry in json_lines(require(source, "data/examples.jsonl", "examples.jsonl")):
        names = [entry.words(f"image_{k}") for k in (0, 1)]
        places = [[f"{folder}{name}.png" for folder in ("images/", "data/images/", "")] for name in names]
        built.add(
            entry,
            images=[images.relative_path(*several) for several in places],
            texts=[entry.words(f"caption_{k}") for k in (0, 1)],
            right=[(0, 0), (1, 1)],
            group=entry.words("collapsed_tag"),
            id=str(entry.integer("id")),
        )
    return write_sets([built], built.counts(sum(_ITEMS.values()), _ITEMS), to, overwrite)
