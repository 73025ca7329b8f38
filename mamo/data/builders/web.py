"""Builders of Conceptual Captions (Sharma et al. 2018) and SBU (Ordonez et al. 2011), lists of captions and links.

Download the images first with `img2dataset --output_format files` into the folder `images/`. Tar shards of img2dataset
need no builder: use them as `data.train_file`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamo.data.builders.report import BuildReport, Count, ReleaseImages, read_json
from mamo.data.pairs_reader import read_lines, write_json_lines

_CC3M = {  # split -> (official list, number of rows)
    "train": ("Train_GCC-training.tsv", 3_318_333),
    "val": ("Validation_GCC-1.1.0-Validation.tsv", 15_840),
}
_SBU_ROWS = 1_000_000
_SUFFIXES = ("jpg", "png", "webp")


def build_cc3m(source: Path, to: Path) -> BuildReport:
    """Write `train.jsonl` and `val.jsonl`, for each official list (`caption<TAB>link` a line) in `source`.

    Each downloaded image gives a row with the caption of the list. Many links are dead; the counts show how many.
    `image_id` is `cc3m/SPLIT-LINE`.

    Raises:
        ValueError: no list, or a row that does not have the list's format (with file and line).
    """
    fetched, images, counts = _fetched(source), ReleaseImages(source, to), []
    for split, (name, expected) in _CC3M.items():
        file = source / name
        if not file.is_file():
            continue
        rows = []
        for line, text in enumerate(read_lines(file), 1):
            caption, tab, link = text.rpartition("\t")
            if not tab or "\t" in caption:
                raise ValueError(f"{file}:{line}: needs a caption, a tab and a link; is it the official file?")
            rows.append((caption, link, f"cc3m/{split}-{line}"))
        counts += _write(rows, fetched, images, to / f"{split}.jsonl", expected, split)
    if not counts:
        raise ValueError(f"{source}: contains neither {' nor '.join(name for name, _ in _CC3M.values())}")
    return BuildReport(tuple(counts))


def build_sbu(source: Path, to: Path) -> BuildReport:
    """Write `pairs.jsonl`: the downloaded images with the captions of the list, as `build_cc3m`.

    The list is `sbu-captions-all.json` (`image_urls` and `captions`) or `SBU_captioned_photo_dataset_urls.txt` and
    `..._captions.txt`.

    Raises:
        ValueError: no list, or different numbers of links and captions.
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
    rows = [(caption, link, f"sbu/{line}") for line, (link, caption) in enumerate(zip(links, captions), 1)]
    counts = _write(rows, _fetched(source), ReleaseImages(source, to), to / "pairs.jsonl", _SBU_ROWS, "pairs")
    return BuildReport(tuple(counts))


def _write(
    rows: list[tuple[str, str, str]],
    fetched: dict[str, str],
    images: ReleaseImages,
    file: Path,
    expected: int,
    name: str,
) -> list[Count]:
    """Write the rows (caption, link, image_id) with a downloaded image; return the counts of rows and images."""
    found = [
        {"image": images.relative_path(fetched[link]), "caption": caption.strip(), "image_id": image_id}
        for caption, link, image_id in rows
        if link in fetched and caption.strip()
    ]
    write_json_lines(file, found)
    return [Count(f"{name} rows of the list", len(rows), expected), Count(f"{name} images", len(found), len(rows))]


def _fetched(source: Path) -> dict[str, str]:
    """Return the path (below `source`) of each image that img2dataset wrote, by link."""
    return dict(_read_sidecars(source))


def _read_sidecars(source: Path) -> Iterator[tuple[str, str]]:
    """Yield (link, image path below `source`) for each JSON file of img2dataset that has an image."""
    for file in sorted((source / "images").rglob("*.json")):
        try:
            row = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON ({error}); fetch its shard again") from None
        if not isinstance(row, dict) or not isinstance(row.get("url"), str):
            continue  # statistics of a shard
        existing = [path for suffix in _SUFFIXES if (path := file.with_suffix(f".{suffix}")).is_file()]
        if existing:
            yield row["url"], str(existing[0].relative_to(source))
