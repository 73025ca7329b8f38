"""Builders of Conceptual Captions (Sharma et al. 2018) and SBU (Ordonez et al. 2011), lists of captions and links.

Download the images first with `img2dataset --output_format files` into the folder `images/`. Tar shards of img2dataset
need no builder: use them as `data.train_file`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamo.data.builders.report import BuildReport, Count, ReleaseImages
from mamo.data.files import brief, read_json
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import read_lines, write_json_lines

_CC3M = {  # split -> (official list, number of rows)
    "train": ("Train_GCC-training.tsv", 3_318_333),
    "val": ("Validation_GCC-1.1.0-Validation.tsv", 15_840),
}
_SBU_ROWS = 1_000_000
_SUFFIXES = ("jpg", "png", "webp")


def build_cc3m(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl` and `val.jsonl`, for each official list (`caption<TAB>link` a line) in `source`.

    Each downloaded image gives a row with the caption of the list. Many links are dead; the counts show how many.
    `image_id` is `cc3m/HASH` of the link: rows with one link are about one picture.

    Raises:
        ValueError: no list, a row that does not have the list's format (with file and line), or an output file that
            exists while `overwrite` is False.
    """
    present = {split: source / name for split, (name, _) in _CC3M.items() if (source / name).is_file()}
    if not present:
        raise ValueError(f"{source}: contains neither {' nor '.join(name for name, _ in _CC3M.values())}")
    images, counts = ReleaseImages(source, to), []
    with OutputFolder(to, overwrite) as output:
        rows = {split: _read_list(file) for split, file in present.items()}
        fetched = _fetched(source)
        for split in present:
            counts += _write(
                rows[split], fetched, images, output.path(f"{split}.jsonl"), ("cc3m", split, _CC3M[split][1])
            )
    absent = tuple(name for split, (name, _) in _CC3M.items() if split not in present)
    return BuildReport(tuple(counts), absent)


def _read_list(file: Path) -> list[tuple[str, str]]:
    """Read (caption, link) of each line of a list."""
    rows = []
    for line, text in enumerate(read_lines(file), 1):
        caption, tab, link = text.rpartition("\t")
        if not tab or "\t" in caption:
            raise ValueError(f"{file}:{line}: needs a caption, a tab and a link; is it the official file?")
        rows.append((caption, link))
    return rows


def build_sbu(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `pairs.jsonl`: the downloaded images with the captions of the list, as `build_cc3m`.

    The list is `sbu-captions-all.json` (`image_urls` and `captions`) or `SBU_captioned_photo_dataset_urls.txt` and
    `..._captions.txt`.

    Raises:
        ValueError: no list, different numbers of links and captions, one that is no text, or `pairs.jsonl` exists
            while `overwrite` is False.
    """
    file = source / "sbu-captions-all.json"
    stem = "SBU_captioned_photo_dataset_{}.txt"
    if file.is_file():
        document = read_json(file)
        lists: list[Any] = [
            document.get(key) if isinstance(document, dict) else None for key in ("image_urls", "captions")
        ]
    else:
        file = source / stem.format("urls")
        if not file.is_file():
            raise ValueError(f"{source}: contains neither sbu-captions-all.json nor {stem.format('urls')}")
        lists = [read_lines(source / stem.format(name)) for name in ("urls", "captions")]
    links, captions = lists
    if not isinstance(links, list) or not isinstance(captions, list) or len(links) != len(captions):
        raise ValueError(f"{file}: needs as many image_urls as captions; is it the official file?")
    for field, values in (("image_urls", links), ("captions", captions)):
        wrong = next((number for number, value in enumerate(values) if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(f"{file}: entry {wrong}: {field}: must be a text, got {brief(values[wrong])}")
    with OutputFolder(to, overwrite) as output:
        target, images = output.path("pairs.jsonl"), ReleaseImages(source, to)
        counts = _write(list(zip(captions, links)), _fetched(source), images, target, ("sbu", "pairs", _SBU_ROWS))
    return BuildReport(tuple(counts))


def _write(
    rows: list[tuple[str, str]],
    fetched: dict[str, str],
    images: ReleaseImages,
    file: Path,
    named: tuple[str, str, int],
) -> list[Count]:
    """Write the rows (caption, link) with a downloaded image; return the counts of rows and images.

    `named` is the data set, the name of the rows in the report, and their published number.
    """
    data_set, name, expected = named
    found = [
        {"image": images.relative_path(fetched[link]), "caption": caption.strip(), "image_id": _id(data_set, link)}
        for caption, link in rows
        if link in fetched and caption.strip()
    ]
    write_json_lines(file, found)
    return [Count(f"{name} rows of the list", len(rows), expected), Count(f"{name} images", len(found), len(rows))]


def _id(data_set: str, link: str) -> str:
    """Return the image id of a link."""
    return f"{data_set}/{hashlib.sha256(link.encode('utf-8', 'replace')).hexdigest()[:16]}"


def _fetched(source: Path) -> dict[str, str]:
    """Return the path (below `source`) of each image that img2dataset wrote, by link."""
    return dict(_read_sidecars(source))


def _read_sidecars(source: Path) -> Iterator[tuple[str, str]]:
    """Yield (link, image path below `source`) for each JSON file of img2dataset that has an image."""
    for file in sorted((source / "images").rglob("*.json")):
        if file.name.startswith("."):
            continue
        try:
            row = read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}; fetch its shard again") from None
        if not isinstance(row, dict) or not isinstance(row.get("url"), str):
            continue  # statistics of a shard
        existing = [path for suffix in _SUFFIXES if (path := file.with_suffix(f".{suffix}")).is_file()]
        if existing:
            yield row["url"], str(existing[0].relative_to(source))
