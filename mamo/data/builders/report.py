"""Parts that the builders share: reading a release, image paths, counts."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mamo.data.files import JsonError, brief, parse_json
from mamo.data.pairs_reader import read_lines
from mamo.data.records import TaskRecord, describe_errors

Record = TypeVar("Record", bound=TaskRecord)
_OFFICIAL = "; is it the official file?"


@dataclass(frozen=True, slots=True)
class Count:
    """Number of something found. `expected` is the published number, None if there is none."""

    name: str
    found: int
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Counts of a build, and the official files that are not in the release."""

    counts: tuple[Count, ...]
    absent: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Format the report with found and expected numbers."""
        lines = [
            f"{count.name}: found {count.found}" + ("" if count.expected is None else f", expected {count.expected}")
            for count in self.counts
        ]
        return lines + ([f"not found, so not built: {', '.join(self.absent)}"] if self.absent else [])

    @property
    def is_complete(self) -> bool:
        """Return whether all published numbers were found."""
        return all(count.expected in (None, count.found) for count in self.counts)


class Entry:
    """An object of a release. Each value is checked when it is read; errors have the place, the field and the fix.

    Args:
        value: the object.
        place: its place, such as "FILE: entry 3" or "FILE:3".
    """

    def __init__(self, value: object, place: str) -> None:
        self.place = place
        if not isinstance(value, dict):
            raise ValueError(f"{place}: must be an object, got {brief(value)}{_OFFICIAL}")
        self.value: dict[object, object] = value

    def __contains__(self, field: str) -> bool:
        return field in self.value

    def error(self, field: str, what: str) -> ValueError:
        """Return the error about a field, to raise."""
        return ValueError(f"{self.place}: {field}: {what}{_OFFICIAL}")

    def _get(self, field: str) -> object:
        if field not in self.value:
            raise self.error(field, "missing")
        return self.value[field]

    def text(self, field: str) -> str:
        """Return a text, which may be blank."""
        value = self._get(field)
        if not isinstance(value, str):
            raise self.error(field, f"must be a text, got {brief(value)}")
        return value

    def words(self, field: str) -> str:
        """Return a text that is not blank, without spaces at its ends."""
        value = self.text(field).strip()
        if not value:
            raise self.error(field, "must not be blank")
        return value

    def integer(self, field: str) -> int:
        """Return an integer."""
        value = self._get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(field, f"must be an integer, got {brief(value)}")
        return value

    def entries(self, field: str) -> list["Entry"]:
        """Return a list of objects."""
        value = self._get(field)
        if not isinstance(value, list):
            raise self.error(field, f"must be a list, got {brief(value)}")
        return [Entry(item, f"{self.place}: {field}[{number}]") for number, item in enumerate(value)]

    def box(self, field: str) -> tuple[float, ...]:
        """Return a box (x, y, width, height)."""
        return box(self._get(field), f"{self.place}: {field}")

    def record(self, kind: type[Record], values: Mapping[str, Any]) -> Record:
        """Return a record that is made from this object."""
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{self.place}: {'; '.join(describe_errors(error, kind, values))}") from None


def box(value: object, place: str) -> tuple[float, ...]:
    """Return the first four numbers of a list, a box (x, y, width, height). Raises ValueError with the place."""
    numbers = value[:4] if isinstance(value, list | tuple) else ()
    if len(numbers) < 4 or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in numbers):
        raise ValueError(f"{place}: must be [x, y, width, height], got {brief(value)}{_OFFICIAL}")
    try:
        return tuple(float(number) for number in numbers)
    except OverflowError:
        raise ValueError(f"{place}: a number is too large{_OFFICIAL}") from None


def entries_of(document: object, key: str, file: Path) -> Iterator[Entry]:
    """Yield the objects of the list `document[key]`, or of the document if `key` is empty.

    Raises:
        ValueError: there is no such list, or an entry is no object.
    """
    rows = document.get(key) if key and isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise ValueError(f"{file}: contains no list {key!r}{_OFFICIAL}")
    for number, row in enumerate(rows):
        yield Entry(row, f"{file}: entry {number}")


def json_lines(file: Path) -> Iterator[tuple[int, Entry]]:
    """Yield line number and object of JSON Lines. Raises ValueError with file and line."""
    for line, text in enumerate(read_lines(file), 1):
        if text.strip():
            try:
                yield line, Entry(parse_json(text), f"{file}:{line}")
            except JsonError as error:
                raise ValueError(f"{file}:{line}: {error}; fetch the release again") from None


class UniqueIds:
    """The ids of a release so far, each with its place."""

    def __init__(self) -> None:
        self.place: dict[object, str] = {}

    def add(self, entry: Entry, field: str, value: object) -> None:
        """Add the id of an entry. Raises ValueError with both places if another entry has it."""
        if value in self.place:
            raise entry.error(field, f"{brief(value)} occurs twice, first in {self.place[value]}")
        self.place[value] = entry.place.rpartition("/")[2]


class ReleaseImages:
    """Image paths of a release relative to the output folder, with a count of the missing images."""

    def __init__(self, release: Path, to: Path) -> None:
        self.release, self.to = release.absolute(), to.absolute()
        self.used: set[str] = set()
        self.missing: set[str] = set()

    def relative_path(self, *candidates: str) -> str:
        """Return the first candidate (path in the release) that exists, else the first, relative to `to`."""
        existing = [path for path in candidates if os.path.isfile(self.release / path)]  # False for a path that is none
        chosen = (existing or list(candidates))[0]
        self.used.add(chosen)
        if not existing:
            self.missing.add(chosen)
        return os.path.relpath(self.release / chosen, self.to)

    def exists(self, name: str) -> bool:
        """Say whether a path that `relative_path` returned has an image."""
        return os.path.isfile(os.path.normpath(self.to / name))

    def count(self) -> Count:
        """Return the number of existing images, out of all that the annotations use."""
        return Count("image files", len(self.used) - len(self.missing), len(self.used))
