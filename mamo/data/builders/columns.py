"""Rows of parquet, Arrow and CSV files, and paths into their nested columns."""

import glob
import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import Buffer

from mamo.data.files import brief, brief_names, path_hint, read_bytes, read_json, read_text
from mamo.data.formats import METADATA
from mamo.data.parquet import open_parquet
from mamo.data.shard_index import MAX_MEMBER_BYTES
from mamo.data.tables import read_table, separator_of

_MAX_ROWS = 256
_BATCH_BYTES = 2**23
"""Rows that are read at a time, and their bytes in the mean."""
_PATH = re.compile(r"\w[\w -]*(\.\w[\w -]*|\[-?\d+\])*")
_STEP = re.compile(r"\[(-?\d+)\]|([^.\[\]]+)")
IMAGE_NAMES = ("image", "images", "img", "jpg", "png", "webp", "jpeg", "file_name", "filepath", "image_path")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "TEXT", "title", "sentences", "description")
"""Columns that are read where none is named, the first that is there."""


class Row(NamedTuple):
    """A row of a file: its place, its encoded image (None for a null), and its other columns as plain values.

    `missing` says which file is not there.
    """

    place: str
    image: Buffer | None
    values: Mapping[str, Any]
    missing: str = ""


class ColumnPath:
    """A path into a column: `caption`, `sentences.raw`, `conversations[-1].value`.

    A name takes a field of a struct, or of each struct of a list; a number takes an item of a list.
    """

    def __init__(self, text: str, option: str) -> None:
        """Parse a path; `option` names it in messages. Raises ValueError for one that is none."""
        if not _PATH.fullmatch(text):
            raise ValueError(f"{option}: {text!r} is no path into a column, such as conversations[-1].value")
        self.text, self.option = text, option
        self.steps: list[int | str] = [int(n) if n else name for n, name in _STEP.findall(text)]
        self.column = str(self.steps[0])

    def check(self, file: Path, schema: Any) -> None:
        """Raise ValueError unless an Arrow schema has the column, and its type the rest of the path."""
        from pyarrow import types

        if self.column not in schema.names:
            raise ValueError(
                f"{file}: {self.option}: has no column {brief_names([self.column])}; its columns: "
                f"{', '.join(schema.names)}"
            )
        kind = schema.field(self.column).type
        for step in self.steps[1:]:
            is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
            inner = kind.value_type if is_list else kind
            if isinstance(step, int) and is_list:
                kind = inner
            elif isinstance(step, str) and types.is_struct(inner) and inner.get_field_index(step) >= 0:
                kind = inner.field(step).type
            else:
                raise ValueError(
                    f"{file}: {self.option}: {self.text} ends nowhere: {kind} has no {brief(step)}; correct the path"
                )

    def value(self, values: Mapping[str, Any]) -> Any:
        """Return what the path leads to in a row; None where a null or too short a list is on the way."""
        found: Any = values.get(self.column)
        for step in self.steps[1:]:
            if isinstance(step, int):
                is_inside = isinstance(found, list) and -len(found) <= step < len(found)
                found = found[step] if is_inside else None
            elif isinstance(found, list):
                found = [item.get(step) for item in found if isinstance(item, dict)]
            else:
                found = found.get(step) if isinstance(found, dict) else None
        return found

    def texts(self, values: Mapping[str, Any], place: str) -> list[str]:
        """Return the texts that the path leads to: one, or those of a list. Raises ValueError for other values."""
        found = self.value(values)
        items = found if isinstance(found, list) else [found]
        if not all(item is None or isinstance(item, str) for item in items):
            raise ValueError(f"{place}: {self.option}: {self.text} is no text or list of texts; got {brief(found)}")
        return [item for item in items if item]


def find_files(places: Sequence[Path], pattern: str) -> list[Path]:
    """Return the files of some files, folders (with their subfolders) and globs, in the order of their names.

    Raises:
        ValueError: there is none at a place.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            own = sorted(file for file in place.rglob(pattern) if file.is_file() and not file.name.startswith("."))
        elif glob.has_magic(str(place)) and not place.exists():
            own = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]
        else:
            own = [place] if place.is_file() else []
        if not own:
            raise ValueError(f"--from: {place}: no file {pattern} there{path_hint(place)}; name files or their folder")
        found += own
    return found


def choose(names: Sequence[str], wanted: Sequence[str], option: str, file: Path) -> str:
    """Return the first of the `wanted` names that a file has. Raises ValueError where it has none."""
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{file}: name a column with {option}; its columns: {', '.join(names)}")


def hugging_face_image(schema: Any) -> str | None:
    """Return the image column that the metadata of Hugging Face's `datasets` name, None without such metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = (name for name, kind in features.items() if "'Image'" in str(kind))
        return next(found, None)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


class ArrowFile:
    """A parquet file, or an Arrow stream of Hugging Face's `datasets`, read in order."""

    def __init__(self, file: Path) -> None:
        """Open a file. Raises ValueError as `parquet.open_parquet`."""
        self.file = file
        self.is_stream = file.suffix == ".arrow"
        self.schema = open_stream(file).schema if self.is_stream else open_parquet(file).schema_arrow

    def batches(self, image: str, columns: Sequence[str]) -> Iterator[list[Row]]:
        """Yield the rows with the image column and other columns, some at once. Raises ValueError if damaged."""
        names = [image, *(name for name in columns if name != image)]
        number, batches = 0, self._stream(names) if self.is_stream else self._parquet(names)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError) as error:
                line = (str(error).splitlines() or [type(error).__name__])[0][:80]
                raise ValueError(f"{self.file}: damaged after row {number} ({line}); fetch it again") from None
            if batch is None:
                return
            others = batch.select(names[1:]).to_pylist() if names[1:] else [{}] * batch.num_rows
            cells, folder = image_cells(batch.column(image), str(self.file)), self.file.parent
            yield [
                row_of(cell, f"{self.file}: row {k}", folder, values)
                for k, (cell, values) in enumerate(zip(cells, others), number)
            ]
            number += batch.num_rows

    def _stream(self, names: list[str]) -> Iterator[Any]:
        for batch in open_stream(self.file):
            n_rows = _n_rows(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, n_rows):
                yield batch.slice(start, n_rows).select(names)

    def _parquet(self, names: list[str]) -> Iterator[Any]:
        """Yield batches; the pages of the file are mapped into memory, those of one batch at a time."""
        import pyarrow
        from pyarrow import parquet

        with self.file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # freed with the last batch
        table = parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(mapped)))
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            for batch in table.iter_batches(
                _n_rows(about.total_byte_size, about.num_rows), row_groups=[group], columns=names
            ):
                mapped.madvise(mmap.MADV_DONTNEED)
                yield batch


def _n_rows(n_bytes: int, n_rows: int) -> int:
    """Return how many of rows of so many bytes are read at a time."""
    return max(1, min(_MAX_ROWS, _BATCH_BYTES * n_rows // max(1, n_bytes)))


def row_of(cell: Buffer | str | None, place: str, folder: Path, values: Mapping[str, Any]) -> Row:
    """Return the row of an image cell: its bytes, or a path relative to `folder`, which is read."""
    if cell is None or not isinstance(cell, str):
        return Row(place, cell, values)
    try:
        return Row(place, read_bytes(folder / cell, MAX_MEMBER_BYTES), values)
    except OSError as error:
        hint = path_hint(cell) or "; fetch the pictures first, such as with img2dataset"
        return Row(place, None, values, f"{place}: {cell}: {error.strerror}{hint}")


def open_stream(file: Path) -> Any:
    """Open an Arrow stream. Raises ValueError where pyarrow is not installed, or it is none."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{file}: needs pyarrow to be read; install it with `pip install mamo[parquet]`") from None
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    except (OSError, ValueError):
        raise ValueError(
            f"{file}: not an Arrow stream of Hugging Face's datasets, or damaged; fetch it again"
        ) from None


def image_cells(column: Any, place: str) -> list[Buffer | str | None]:
    """Return the images of an Arrow column: bytes without a copy, paths, or None for nulls.

    A cell is a struct of `bytes` and `path`, bytes, a path, or a list of these, of which the first is taken.

    Raises:
        ValueError: the column is none of these.
    """
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        return image_cells(column.dictionary_decode(), place)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        cells = image_cells(column.values, place)
        starts = column.offsets.to_pylist() if not types.is_fixed_size_list(kind) else None
        if starts is None:
            starts = [(column.offset + k) * kind.list_size for k in range(len(column) + 1)]
        is_there = [valid and end > start for valid, start, end in zip(_valid(column), starts, starts[1:])]
        return [cells[start] if there else None for there, start in zip(is_there, starts)]
    if types.is_struct(kind):
        parts = {kind.field(k).name: part for k, part in enumerate(column.flatten())}
        if "bytes" in parts and (parts["bytes"].null_count == 0 or "path" not in parts):
            return image_cells(parts["bytes"], place)
        found = [image_cells(parts[name], place) for name in ("bytes", "path") if name in parts]
        if found:
            return [next((cell for cell in cells if cell is not None), None) for cells in zip(*found)]
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        texts: list[Buffer | str | None] = column.to_pylist()
        return texts
    if types.is_binary(kind) or types.is_large_binary(kind):
        _, offsets, content = column.buffers()
        width = np.int64 if types.is_large_binary(kind) else np.int32
        bounds = np.frombuffer(offsets, width)[column.offset : column.offset + len(column) + 1].tolist()
        data = memoryview(content if content is not None else b"")
        return [data[a:b] if valid else None for valid, a, b in zip(_valid(column), bounds, bounds[1:])]
    if types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return [scalar.as_buffer() if scalar.is_valid else None for scalar in column]
    if types.is_null(kind):
        return [None] * len(column)
    raise ValueError(f"{place}: --image: must be bytes, a path, or a struct or list of these; got {kind}")


def _valid(column: Any) -> list[bool]:
    found: list[bool] = column.is_valid().to_pylist() if column.null_count else [True] * len(column)
    return found


class TableFile:
    """A CSV or TSV file whose rows have the path of an image."""

    def __init__(self, file: Path, columns: Sequence[str] = ()) -> None:
        """Read a file. Raises ValueError where it is no table."""
        self.file, self.text, self.columns = file, read_text(file), columns
        self.separator = separator_of(file, self.text, len(columns))
        first = None if not self.separator else next(self._rows(), None)
        if first is None:
            raise ValueError(f"{file}: no rows of a CSV or TSV table; write a header and a row for each picture")
        self.names = list(first[1])

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        return read_table(self.file, self.text, self.separator, self.columns)

    def batches(self, image: str, columns: Sequence[str]) -> Iterator[list[Row]]:
        """Yield the rows, one at a time. Raises ValueError for a bad row."""
        for line, values in self._rows():
            place = f"{self.file}:{line}"
            yield [row_of(values[image] or None, place, self.file.parent.absolute(), values)]


def dataset_files(folder: Path) -> tuple[list[Path], str]:
    """Return the files of a Hugging Face data set in a folder, and their kind: `arrow`, `parquet` or `csv`.

    `Dataset.save_to_disk` writes `state.json` and Arrow files, the hub has parquet files, an image folder has
    `metadata.csv`.

    Raises:
        ValueError: it is none of these.
    """
    if (folder / "state.json").is_file():
        state = read_json(folder / "state.json")
        listed = state.get("_data_files") if isinstance(state, dict) else None
        names = [str(entry.get("filename")) for entry in listed or [] if isinstance(entry, dict)]
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / 'state.json'}: lists no data files; save the data set again")
        return [folder / name for name in names], "arrow"
    if (folder / "dataset_dict.json").is_file():
        raise ValueError(
            f"--from: {folder}: a data set of several splits; name the folder of one, such as {folder}/train"
        )
    if (folder / METADATA[1]).is_file():
        return [folder / METADATA[1]], "csv"
    if (folder / METADATA[0]).is_file():
        raise ValueError(f"--from: {folder}: an image folder, which is read as it is: data.train_file={folder}")
    return find_files([folder], "*.parquet"), "parquet"
