"""What the builders share: reading a release, naming its images, counting."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Count:
    """How many of something were found; `expected` is the published number, None where there is none."""

    what: str
    found: int
    expected: int | None = None


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The counts of a build."""

    counts: tuple[Count, ...]

    def lines(self) -> list[str]:
        """The report, expected beside found."""
        return [
            f"{count.what}: found {count.found}" + ("" if count.expected is None else f", expected {count.expected}")
            for count in self.counts
        ]

    @property
    def is_complete(self) -> bool:
        """Whether everything that was published was found."""
        return all(count.expected in (None, count.found) for count in self.counts)


def read_json(file: Path) -> Any:
    """A JSON file of a release. Raises ValueError naming the file."""
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}; --from must be a folder that holds it") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch the release again") from None


def rows_of(document: Any, key: str, fields: tuple[str, ...], file: Path) -> list[dict[str, Any]]:
    """`document[key]` (or the document itself where `key` is empty) as objects that have all `fields`.

    Raises ValueError naming file, entry and field.
    """
    rows = document.get(key) if key and isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no list {key!r}; is it the official file?")
    for number, row in enumerate(rows):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(
                f"{file}: entry {number} of {key or 'the list'} has no {missing[0]!r}; is it the official file?"
            )
    return rows


class Images:
    """Names images of a release relative to the folder that is written, and counts those that are not there."""

    def __init__(self, release: Path, to: Path) -> None:
        self.release, self.to = release.absolute(), to.absolute()
        self.named: set[str] = set()
        self.missing: set[str] = set()

    def name(self, *candidates: str) -> str:
        """The first of the candidate paths (below the release) that exists, else the first; relative to `to`."""
        there = [path for path in candidates if (self.release / path).is_file()]
        chosen = (there or list(candidates))[0]
        self.named.add(chosen)
        if not there:
            self.missing.add(chosen)
        return os.path.relpath(self.release / chosen, self.to)

    def count(self) -> Count:
        """Images on the disk of those that the annotations name."""
        return Count("image files", len(self.named) - len(self.missing), len(self.named))
