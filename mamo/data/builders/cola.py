"""Builder of Cola (Ray et al. 2023), multiple objects: two images and two captions that exchange attributes."""

from pathlib import Path
from urllib.parse import urlparse

from mamo.data.builders.item_sets import ItemSet, require, write_sets
from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages
from mamo.data.files import brief, read_json

_FILE = "COLA_multiobjects_matching_benchmark.json"
_ROWS = 210


def build_cola(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `cola.jsonl`: each caption chooses among the two images of its row; a row is a set, both must be right.

    `source` contains the official JSON file, in `data/` or itself, and Visual Genome's images in `VG_100K/` and
    `VG_100K_2/`, or in `images/`, under the names of the addresses.

    Raises:
        ValueError: no such file, a row of another form, or the output exists while `overwrite` is False.
    """
    images = ReleaseImages(source, to)
    built = ItemSet("cola", images)
    file = require(source, f"data/{_FILE}", _FILE)
    rows = read_json(file)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must be a list of rows, got {brief(rows)}; is it the official file?")
    for number, row in enumerate(rows):
        entry = Entry({"row": row}, f"{file}: entry {number}")
        if (
            not isinstance(row, list)
            or len(row) != 4
            or not all(isinstance(text, str) and text.strip() for text in row)
        ):
            raise entry.error("row", f"must be [image 1, caption 1, image 2, caption 2], got {brief(row)}")
        names = [Path(urlparse(address).path).name for address in row[::2]]
        folders = ("images", "VG_100K", "VG_100K_2")
        both = [images.relative_path(*(f"{folder}/{name}" for folder in folders), name) for name in names]
        for side in (0, 1):
            built.add(
                entry,
                images=both,
                texts=[row[1 + 2 * side]],
                right=[(side, 0)],
                group="multiple objects",
                id=f"{number}/{side}",
                set={"pair": str(number)},
            )
    return write_sets([built], [Count("rows", len(rows), _ROWS), *built.counts()], to, overwrite)
