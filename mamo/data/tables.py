"""Rows of CSV and TSV files (RFC 4180 quoting), with a header line or with the names of their columns."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

_LONGEST_FIELD = 2**24
_MARKS = "\t,;|"


def separator_of(path: Path, text: str, n_columns: int = 0) -> str:
    """Return the separator of a table's columns, "" if the text is no table.

    It is a tab in a `.tsv`, else the first of tab, comma, semicolon and bar that the first line has, or that splits it
    into `n_columns` columns where that number is known. A `.csv` of one column has a comma. A text of which one of the
    first 20 lines begins as JSON is no table.
    """
    lines = [line for line in text[:65536].split("\n")[:20] if line.strip()]
    if not lines or any(line.lstrip()[0] in "[{" for line in lines):
        return ""
    suffix = path.suffix.lower()
    default = {".tsv": "\t", ".csv": ","}.get(suffix, "")
    marks = [mark for mark in _MARKS if mark in lines[0]]
    marks.sort(key=lambda mark: bool(n_columns) and len(next(csv.reader(lines[:1], delimiter=mark))) != n_columns)
    return "\t" if suffix == ".tsv" else next(iter(marks), default)


def read_table(
    path: Path, text: str, separator: str, columns: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row by column) of a table; the line is the first of the row. Blank lines are skipped.

    Args:
        path: named in messages.
        text: of the file.
        separator: of the columns.
        columns: names of the columns of a file without a header; without any, the first line has the names. A line
            of these names is a header too.

    Raises:
        ValueError: a row has another number of columns than the header, or its quotation is not closed; or two columns
            have one name.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names, line = [name.strip() for name in columns], 1
    try:
        for values in reader:
            first, line = line, reader.line_num + 1
            if not any(map(str.strip, values)):
                continue
            if not names or values == names:
                names = [value.strip() for value in values]
                twice = [name for name in names if names.count(name) > 1]
                if twice:
                    raise ValueError(f"{path}:{first}: two columns have the name {twice[0]!r}; rename one")
                continue
            if len(values) != len(names):
                raise ValueError(
                    f"{path}:{first}: {len(values)} columns, {len(names)} names ({', '.join(names)}); put a text with "
                    f"{'a tab' if separator == chr(9) else repr(separator)} into quotation marks"
                )
            yield first, dict(zip(names, values))
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not a row of a table ({error}); close the quotation marks") from None
