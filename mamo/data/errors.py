"""Collection of the errors in a file, so that one message lists them, and of the fields that are not read."""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mamo.data.files import JsonError, brief_names, parse_json

logger = logging.getLogger(__name__)

_MAX_LISTED = 10
_VARIABLE = re.compile(r'\d+|"(?:[^"\\]|\\.)*"')
"""Parts of a message that differ between equal errors: numbers and quoted values."""
_MISTYPED = 0.85
"""Similarity from which an unknown field counts as a mistyped optional field."""


class ErrorCollector:
    """The errors of one file, by line. Errors that differ only in a value are listed once."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, text: str) -> None:
        """Add an error of a line (1-based)."""
        self.found.append((line, text))

    def raise_if_any(self) -> None:
        """Raise ValueError with the first ten kinds of errors by line, and the number of the others."""
        groups: dict[str, list[tuple[int, str]]] = {}
        for line, text in sorted(self.found, key=lambda error: error[0]):
            groups.setdefault(_VARIABLE.sub("#", text), []).append((line, text))
        if groups:
            listed = [self._format(group) for group in list(groups.values())[:_MAX_LISTED]]
            hidden = sum(map(len, list(groups.values())[_MAX_LISTED:]))
            more = f"; and {hidden} more" if hidden > 0 else ""
            raise ValueError(f"{len(self.found)} problem(s): " + "; ".join(listed) + more)

    def _format(self, group: list[tuple[int, str]]) -> str:
        line, text = group[0]
        more = f" (and {len(group) - 1} more like it, the last in line {group[-1][0]})" if len(group) > 1 else ""
        return f"{self.source}:{line}: " + " ".join(text.splitlines()) + more


def json_rows(lines: Iterable[str], errors: ErrorCollector, first_line: int = 1) -> Iterator[tuple[int, Any]]:
    """Yield line number and value of the lines that are not blank; add those that are no JSON to `errors`."""
    for number, line in enumerate(lines, first_line):
        if line.strip():
            try:
                row = parse_json(line)
            except JsonError as error:
                errors.add(number, error.advise("write one object a line"))
            else:
                yield number, row


class UnknownFields:
    """Fields of a file's rows that are not read. They are ignored and counted, unless they look like a mistyped one."""

    def __init__(self, known: Mapping[str, str], required: Iterable[str]) -> None:
        """Store the known fields, each with a description of its values, and the names of those that rows need."""
        self.known, self.required = known, set(required)
        self.ignored: Counter[str] = Counter()

    def check(self, row: Mapping[str, object]) -> list[str]:
        """Count the unknown fields of a row; return an error for each missing or mistyped field."""
        if row.keys() <= self.known.keys() and row.keys() >= self.required:
            return []
        unknown = [name for name in row if name not in self.known]
        absent = [name for name in self.known if name not in row]
        errors, mistyped = [], set()
        for name in absent:
            is_required = name in self.required
            near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.6 if is_required else _MISTYPED)
            mistyped.update(near)
            if near:
                missing = f"field '{name}' is missing; " if is_required else ""
                known = f"; known fields: {', '.join(self.known)}"
                fix = "" if is_required else "; rename or remove it"
                errors.append(f"{missing}unknown field {brief_names(near)} (did you mean '{name}'?){fix}{known}")
            elif is_required:
                has = f"; the row has {brief_names(list(row))}" if row else ""
                known = f"known fields: {', '.join(self.known)}"
                errors.append(f"field '{name}' is missing; add {self.known[name]} ({known}{has})")
        self.ignored.update(name for name in unknown if name not in mistyped)
        return errors

    def log(self, source: Path) -> None:
        """Log one line with the ignored fields, if there are any."""
        if self.ignored:
            rows = max(self.ignored.values())
            logger.info("%s: fields that are not read: %s (in %d rows)", source, brief_names(list(self.ignored)), rows)
