"""Reading of parquet files in order, a batch of rows at a time, with pyarrow (an extra).

An image in a column is a struct of `bytes` and `path` (Hugging Face), plain bytes, or a path.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.data.files import brief, brief_names, path_hint

_ROWS = 64
"""Rows that are in memory at a time."""


def read_parquet(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of the files, in order.

    Args:
        files: parquet files with the same columns.
        columns: columns to read; others are not touched.

    Yields:
        The place of the row for messages ("FILE: row N", counted from 0) and its values by column.

    Raises:
        ValueError: pyarrow is not installed, a file cannot be read or is damaged, or a column is missing.
    """
    for file in files:
        table = open_parquet(file)
        names = table.schema_arrow.names
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"{file}: has no column {brief_names(missing)}; its columns: {', '.join(names)}")
        row = 0
        try:
            for batch in table.iter_batches(_ROWS, columns=list(columns)):
                for values in batch.to_pylist():
                    yield f"{file}: row {row}", values
                    row += 1
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: damaged after row {row} ({_line(error)}); fetch it again") from None


def open_parquet(file: Path) -> Any:
    """Open a parquet file. Raises ValueError where pyarrow is not installed, or the file cannot be read."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{file}: needs pyarrow to be read; install it with `pip install mamo[parquet]`") from None
    if not file.is_file():
        raise ValueError(f"{file}: no such file{path_hint(file)}")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a parquet file, or damaged ({_line(error)}); fetch it again") from None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__


def image_content(value: object, place: str, folder: Path) -> bytes | Path | None:
    """Return the encoded image of a cell.

    Args:
        value: a mapping of `bytes` and `path`, bytes, a path, or None.
        place: of the cell, for messages.
        folder: paths are relative to it.

    Returns:
        The bytes of a file; the path of an existing one; None for a null, or for a path at which there is none.

    Raises:
        ValueError: the value is none of these.
    """
    path = value
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is not None:
            return bytes(content)
    if path is None:
        return None
    if isinstance(path, bytes | bytearray | memoryview):
        return bytes(path)
    if not isinstance(path, str):
        raise ValueError(f"{place}: must be an image (bytes, or a struct of bytes and path), got {brief(value)}")
    return folder / path if (folder / path).is_file() else None


def parquet_files(folder: Path, pattern: str = "*.parquet") -> list[Path]:
    """Return the parquet files of a folder and its subfolders by name. Raises ValueError if there is none."""
    found = sorted(file for file in folder.rglob(pattern) if file.is_file())
    if not found:
        raise ValueError(f"{folder}: contains no file {pattern}; name the folder that holds them")
    return found
