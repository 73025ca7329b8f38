"""Parts that the builders share: reading a release, image paths, counts."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamo.config.values import Values


@dataclass(frozen=True, slots=True)
class Count:
    """Number of something found. `expected` is the published number, None if there is none."""

    name: str
    found: int
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Counts of a build."""

    counts: tuple[Count, ...]

    def lines(self) -> list[str]:
        """Format the report with found and expected numbers."""
        return [
            f"{count.name}: found {count.found}" + ("" if count.expected is None else f", expected {count.expected}")
            for count in self.counts
        ]

    @property
    def is_complete(self) -> bool:
        """Return whether all published numbers were found."""
        return all(count.expected in (None, count.found) for count in self.counts)


def read_json(file: Path) -> Any:
    """Read a JSON file of a release. Raises ValueError with the file name."""
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read: {error.strerror}; --from must be a folder that contains it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch the release again") from None


def get_rows(document: Any, key: str, fields: tuple[str, ...], file: Path) -> list[Values]:
    """Return `document[key]`, or the document if `key` is empty, as a list of objects that have all `fields`.

    Raises:
        ValueError: with file, entry and field.
    """
    rows = document.get(key) if key and isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise ValueError(f"{file}: contains no list {key!r}; is it the official file?")
    for number, row in enumerate(rows):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(
                f"{file}: entry {number} of {key or 'the list'} has no {missing[0]!r}; is it the official file?"
            )
    return rows


class ReleaseImages:
    """Image paths of a release relative to the output folder, with a count of the missing images."""

    def __init__(self, release: Path, to: Path) -> None:
        self.release, self.to = release.absolute(), to.absolute()
        self.used: set[str] = set()
        self.missing: set[str] = set()

    def relative_path(self, *candidates: str) -> str:
        """Return the first candidate (path in the release) that exists, else the first, relative to `to`."""
        existing = [path for path in candidates if (self.release / path).is_file()]
        chosen = (existing or list(candidates))[0]
        self.used.add(chosen)
        if not existing:
            self.missing.add(chosen)
        return os.path.relpath(self.release / chosen, self.to)

    def count(self) -> Count:
        """Return the number of existing images, out of all that the annotations use."""
        return Count("image files", len(self.used) - len(self.missing), len(self.used))
