"""Builder of ColorSwap (Burapacheep et al. 2024): two images and two captions that exchange colours."""

from pathlib import Path

from mamo.data.builders.item_sets import ExtractedImages, ItemSet
from mamo.data.builders.report import BuildReport, Entry
from mamo.data.output import OutputFolder
from mamo.data.parquet import image_content, parquet_files, read_parquet

_COLUMNS = ("id", "image_1", "image_2", "caption_1", "caption_2")


def build_colorswap(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `colorswap.jsonl` of the test split; the images are written into `images/`.

    `source` contains the parquet files `test*.parquet` of `stanfordnlp/colorswap`.

    Raises:
        ValueError: no such file, other columns, or the output exists while `overwrite` is False.
    """
    with OutputFolder(to, overwrite) as output:
        images = ExtractedImages(source, to, output, "images")
        built = ItemSet("colorswap", images)
        for place, row in read_parquet(parquet_files(source, "test*.parquet"), _COLUMNS):
            entry = Entry(row, place)
            cells = [(field, f"{place}: {field}") for field in ("image_1", "image_2")]
            built.add(
                entry,
                images=[images.add(image_content(row[field], where, source), where) for field, where in cells],
                texts=[entry.words("caption_1"), entry.words("caption_2")],
                right=[(0, 0), (1, 1)],
                group="colour",
                id=str(row["id"]),
            )
        built.write(output)
        counts = built.counts(note="300, unverified")
    return BuildReport((*counts, images.count()))
