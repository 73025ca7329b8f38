"""Parts that the builders of fine-grained sets share: places of images, items, counts."""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, UniqueIds
from mamo.data.files import brief, brief_names, read_text
from mamo.data.items import Item, as_row, equal_texts, index_problems
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import write_json_lines

_SUFFIXES = ((b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"))


class ItemSet:
    """The items of one file while it is built, with the counts that its report compares."""

    def __init__(self, name: str, images: ReleaseImages) -> None:
        """Store the arguments.

        Args:
            name: stem of the file; `mamo.evaluation.fine_grained` knows the published ones.
            images: of the release.
        """
        self.name, self.images = name, images
        self.items: list[Item] = []
        self._ids = UniqueIds()

    def add(self, entry: Entry, **values: Any) -> None:
        """Add an item. Raises ValueError, with the entry's place, where it is malformed or its id is not new."""
        item = entry.record(Item, values)
        self._ids.add(entry, "id", item.id)
        problems = index_problems(item)
        if problems:
            raise ValueError(f"{entry.place}: {problems[0]}")
        self.items.append(item)

    def write(self, output: OutputFolder) -> None:
        """Write `NAME.jsonl`."""
        write_json_lines(output.path(f"{self.name}.jsonl"), map(as_row, self.items))

    def counts(
        self, expected: int | None = None, groups: Mapping[str, int] | None = None, note: str = ""
    ) -> list[Count]:
        """Return the counts: items, items of each group in `groups`, items that have all their images, equal texts.

        Args:
            expected: published number of items; None if it is not known for certain.
            groups: published number of items by group.
            note: about a published number that was not verified, printed and never compared.
        """
        by_group = Counter(item.group for item in self.items)
        n_whole = sum(all(self.images.exists(name) for name in item.images) for item in self.items)
        counts = [Count(f"{self.name} items{f' ({note})' if note else ''}", len(self.items), expected)]
        counts += [Count(f"{self.name} items of {group}", by_group[group], n) for group, n in (groups or {}).items()]
        counts.append(Count(f"{self.name} items that have their images", n_whole, len(self.items)))
        n_equal = sum(bool(equal_texts(item)) for item in self.items)
        return [*counts, *([Count(f"{self.name} items with equal texts", n_equal)] if n_equal else [])]


def write_sets(
    sets: Sequence[ItemSet], counts: Sequence[Count], to: Path, overwrite: bool, absent: Sequence[str] = ()
) -> BuildReport:
    """Write the files of some sets and return the report, which ends with the count of the images."""
    with OutputFolder(to, overwrite) as output:
        for built in sets:
            built.write(output)
    return BuildReport((*counts, sets[0].images.count()), tuple(absent))


def find(source: Path, *names: str) -> Path | None:
    """Return the first of some files that the release has; None for none."""
    return next((source / name for name in names if (source / name).is_file()), None)


def require(source: Path, *names: str) -> Path:
    """Return the first of some files that the release has. Raises ValueError if it has none."""
    found = find(source, *names)
    if found is None:
        raise ValueError(f"{source}: contains none of {', '.join(names)}; --from must be a folder that contains it")
    return found


def entries_by_key(document: object, file: Path) -> Iterator[tuple[str, Entry]]:
    """Yield key and value of an object of objects. Raises ValueError for anything else."""
    if not isinstance(document, dict):
        raise ValueError(f"{file}: must be an object of objects, got {brief(document)}; is it the official file?")
    for key, value in document.items():
        yield str(key), Entry(value, f"{file}: entry {brief(key)}")


def group_files(source: Path, groups: Iterable[str], absent: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each group, `NAME.json` in `data/` or `source` itself; list in `absent` those without.

    Raises:
        ValueError: no group has a file.
    """
    files = {group: find(source, f"data/{group}.json", f"{group}.json") for group in groups}
    absent += [f"{group}.json" for group, file in files.items() if file is None]
    if len(absent) == len(files):
        raise ValueError(f"{source}: contains none of {', '.join(absent)}; --from must be a folder that contains them")
    yield from ((group, file) for group, file in files.items() if file is not None)


def is_texts(value: object) -> bool:
    """Say whether a value is a list of texts that are not blank."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def coco_places(name: str, year: str = "2017", split: str = "val") -> list[str]:
    """Return where the image of a COCO file name or id may lie in a release."""
    plain = name.rpartition("_")[2]
    old = f"COCO_{split}2014_{plain}"
    return [f"{split}{year}/{name}", f"images/{name}", name, f"{split}2017/{plain}", f"{split}2014/{old}"]


class ExtractedImages(ReleaseImages):
    """Images whose bytes lie in the release's tables, written into a folder of the output by their digest."""

    def __init__(self, release: Path, to: Path, output: OutputFolder, folder: str) -> None:
        super().__init__(release, to)
        self.output, self.folder = output, folder

    def add(self, content: bytes | Path | None, place: str) -> str:
        """Write an image once and return its path relative to the output; one that is missing is counted."""
        if content is None:
            self.used.add(place)
            self.missing.add(place)
            return f"{self.folder}/missing-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
        if isinstance(content, Path):
            name = os.path.relpath(content, self.release)
            self.used.add(name)
            return os.path.relpath(content.absolute(), self.to)
        suffix = next((suffix for start, suffix in _SUFFIXES if content.startswith(start)), ".jpg")
        name = f"{self.folder}/{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if name not in self.used:
            self.used.add(name)
            self.output.path(name).write_bytes(content)
        return name

    def exists(self, name: str) -> bool:
        """Say whether a path that `add` returned has an image."""
        return name in self.used or super().exists(name)


def csv_entries(file: Path, fields: Sequence[str], by_position: bool = False) -> Iterator[Entry]:
    """Yield the rows of a CSV file with a header.

    Args:
        file: comma-separated, quoted as usual.
        fields: columns that every row needs.
        by_position: whether the first columns are the fields, whatever the header calls them.

    Raises:
        ValueError: a column is missing, or a row is shorter or longer than the header.
    """
    reader = csv.reader(io.StringIO(read_text(file)), strict=True)
    try:
        header = next(reader, [])
        names = [*fields, *header[len(fields) :]] if by_position else header
        missing = [name for name in fields if name not in names] or (list(fields) if len(names) > len(header) else [])
        if missing:
            raise ValueError(f"{file}:1: has no column {brief_names(missing)}; its columns: {brief_names(header)}")
        for row in reader:
            if not row:
                continue
            place = f"{file}:{reader.line_num}"
            if len(row) != len(names):
                raise ValueError(f"{place}: has {len(row)} values, the header has {len(names)}; fetch the file again")
            yield Entry(dict(zip(names, row)), place)
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: not valid CSV ({error}); fetch the file again") from None
