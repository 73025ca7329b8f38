"""Builder of BiVLC (Miranda et al. 2024): SugarCrepe's captions and negatives, each with an image."""

from pathlib import Path

from mamo.data.builders.item_sets import ExtractedImages, ItemSet
from mamo.data.builders.report import BuildReport, Entry
from mamo.data.output import OutputFolder
from mamo.data.parquet import image_content, parquet_files, read_parquet

_ITEMS = {
    "replace-obj": 1200, "replace-rel": 462, "replace-att": 437, "add-obj": 399, "swap-att": 278, "swap-obj": 81,
    "add-att": 76,
}  # fmt: skip
_COLUMNS = ("image", "caption", "negative_caption", "negative_image", "type", "subtype")


def build_bivlc(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `bivlc.jsonl`, grouped by type: two images and two texts; the images are written into `images/`.

    `source` contains the parquet files of the test split.

    Raises:
        ValueError: no parquet file, other columns, or the output exists while `overwrite` is False.
    """
    with OutputFolder(to, overwrite) as output:
        images = ExtractedImages(source, to, output, "images")
        built = ItemSet("bivlc", images)
        for number, (place, row) in enumerate(read_parquet(parquet_files(source), _COLUMNS)):
            entry = Entry(row, place)
            cells = [(field, f"{place}: {field}") for field in ("image", "negative_image")]
            built.add(
                entry,
                images=[images.add(image_content(row[field], where, source), where) for field, where in cells],
                texts=[entry.words("caption"), entry.words("negative_caption")],
                right=[(0, 0), (1, 1)],
                group=f"{entry.words('type')}-{entry.words('subtype')}".lower(),
                id=str(number),
            )
        built.write(output)
        counts = built.counts(sum(_ITEMS.values()), _ITEMS)
    return BuildReport((*counts, images.count()))
