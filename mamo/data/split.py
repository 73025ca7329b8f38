"""Split a pairs file into training and held-out pairs, by image."""

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from mamo.data.files import read_text
from mamo.data.output import OutputFolder
from mamo.data.pair_lines import LinePairs
from mamo.data.pair_record import PairRecord
from mamo.data.pairs_reader import read_lines, read_pairs
from mamo.data.tables import read_table, separator_of


def split_pairs(file: Path, share: float, columns: Sequence[str] = (), overwrite: bool = False) -> list[str]:
    """Write `NAME-train` and `NAME-eval` next to a JSON Lines, CSV or TSV file, in the same order.

    Lines of JSON stay as they are; values of tables do, while quotes and line ends may be written otherwise.

    All rows of an image are on one side. The side depends on the image id alone, by default the path relative to the
    file: it is the same in every call, and stays so when rows are added.

    Args:
        file: pairs.
        share: expected share of the held-out images, between 0 and 1.
        columns: names of the columns of a table without a header.
        overwrite: whether existing files may be replaced.

    Returns:
        A line for each file with its numbers of pairs and images.

    Raises:
        ValueError: a bad row or another layout, a share out of range or one that leaves a side empty, or a file that
            exists.
    """
    if not 0 < share < 1:
        raise ValueError(f"--held-out: must be between 0 and 1, got {share:g}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file; name one JSON Lines, CSV or TSV file")
    records = read_pairs(file, columns=columns)
    header, texts = _rows(file, records, columns)
    sides: dict[str, list[PairRecord]] = {"train": [], "eval": []}
    for record in records:
        sides["eval" if _fraction(_image_key(record, file)) < share else "train"].append(record)
    n_images = {side: len({_image_key(record, file) for record in found}) for side, found in sides.items()}
    if not all(n_images.values()):
        raise ValueError(f"--held-out: {share:g} of {sum(n_images.values())} images leaves one side empty; change it")
    with OutputFolder(file.parent, overwrite) as output:
        for side, found in sides.items():
            content = header + "".join(texts[record.line] for record in found)
            output.path(_name(file, side)).write_bytes(content.encode("utf-8"))
    return [
        f"{file.with_name(_name(file, side))}: {len(found)} pairs of {n_images[side]} images"
        for side, found in sides.items()
    ]


def _name(file: Path, side: str) -> str:
    return f"{file.stem}-{side}{file.suffix}"


def _image_key(record: PairRecord, file: Path) -> str:
    """Return the image id; without one in the row, the path relative to the file, which may be moved."""
    is_path = record.image_id == record.image
    return os.path.relpath(record.image_id, file.parent.absolute()) if is_path else record.image_id


def _fraction(key: str) -> float:
    """Return a number from 0 to below 1 that looks random, by SHA-256."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _rows(file: Path, records: Sequence[PairRecord], columns: Sequence[str]) -> tuple[str, dict[int, str]]:
    """Return the header, "" without one, and the text of each row by its line."""
    if isinstance(records, LinePairs):
        return "", {number: f"{line}\n" for number, line in enumerate(read_lines(file), 1)}
    text = read_text(file)
    separator = separator_of(file, text, len(columns))
    if not separator:
        raise ValueError(f"{file}: only JSON Lines, CSV and TSV are split; official files have splits of their own")
    rows = list(read_table(file, text, separator, columns))
    header = "" if columns else _table_line([*rows[0][1]], separator)
    return header, {line: _table_line([*row.values()], separator) for line, row in rows}


def _table_line(values: Sequence[str], separator: str) -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator, lineterminator="\n").writerow(values)
    return stream.getvalue()
