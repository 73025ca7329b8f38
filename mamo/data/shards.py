"""Pairs in tar shards with img2dataset's layout (`KEY.jpg` with `KEY.txt` or `KEY.json`), without extraction.

A table with 25 bytes a pair contains the offsets of image and caption (175 MB for seven million pairs). The index of a
folder is a file that all loader workers map into memory. A pair becomes a Python object only when it is loaded.
`index_folder` writes the index once. Without an index, every start reads every header of every tar.

The training order is one permutation of all pairs (`sampler.epoch_order`), not a shuffle window over shards. Samples of
a window would be similar, because neighbours in a shard come from the same crawl, and the order would depend on the
division into shards. The cost is one short random read for each image. Spinning disks (about 100 random reads a second)
are therefore too slow for shards.
"""

import concurrent.futures
import glob
import hashlib
import json
import logging
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mamo.config.values import Values
from mamo.data.errors import ErrorCollector
from mamo.data.files import JsonError, open_regular, parse_json, path_hint, read_json
from mamo.data.pair_record import PairRecord
from mamo.data.shard_index import MAX_MEMBER_BYTES, ShardMember, index_shard, read_member

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
ROW = np.dtype(
    [("image_offset", "<i8"), ("image_size", "<i4"), ("text_offset", "<i8"), ("text_size", "<i4"), ("is_json", "?")]
)
INDEX, TABLE = "index.json", "index.npy"
"""Files in a folder of shards: names, sizes and times of the shards; one `ROW` for each pair, in shard order."""
_HEADER_BYTES = 512
_MAX_TEXT_BYTES = 2**24
_ENTRY = ("name", "bytes", "mtime_ns", "pairs")
_AGAIN = "; run `mamo data index` again when the shards are complete"
_CHUNK_ROWS = 2**20
Rows = NDArray[np.void]


class TarShardDataset(Sequence[PairRecord]):
    """Sequence of the pairs of some shards, in shard order. Pairs are read on access.

    Args:
        shards: absolute paths.
        counts: number of pairs in each shard.
        rows: [sum of counts] of `ROW`.
        folder: the indexed folder, from which other processes open the same table; None without an index.
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int], rows: Rows, folder: Path | None = None) -> None:
        self.shards = list(shards)
        self.first_row = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        self.rows = rows
        self.folder = folder

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> PairRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[PairRecord]: ...
    def __getitem__(self, index: int | slice) -> PairRecord | list[PairRecord]:
        """Read pair `index` from its shard.

        Raises:
            OSError: the shard is missing or shorter than at indexing.
            ValueError: the caption is no longer text.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = self.rows[index]
        number = int(np.searchsorted(self.first_row, index, side="right")) - 1
        shard = self.shards[number]
        image_offset, text_size = int(row["image_offset"]), int(row["text_size"])
        with open_regular(Path(shard)) as file:
            file.seek(image_offset - _HEADER_BYTES)
            name = _name_in(file.read(_HEADER_BYTES))
            file.seek(int(row["text_offset"]))
            text = file.read(text_size)
        if len(text) != text_size:
            raise OSError(f"{shard}: the caption of {name} is cut off; the shard changed after indexing")
        image = ShardMember(shard, name, image_offset, int(row["image_size"]))
        caption = _caption_of(text, bool(row["is_json"]), str(image))
        image_id = f"{image}@{image_offset}"  # a header may cut its name, or have "?" in it
        return PairRecord(image, (caption,), image_id, index - int(self.first_row[number]) + 1, shard)

    def __reduce__(self) -> Any:
        """Pickle the path of the index instead of the table, for loader workers."""
        if self.folder is not None:
            return _open_mapped, (self.folder,)
        return TarShardDataset, (self.shards, np.diff(self.first_row).tolist(), self.rows)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names and tables of the shards; the shards are not read."""
        names = "\n".join(Path(shard).name for shard in self.shards)
        digest = hashlib.sha256(names.encode("utf-8", "replace") + self.first_row.tobytes())
        digest.update(np.ascontiguousarray(self.rows).view(np.uint8).data)
        return digest.hexdigest()


def _name_in(header: bytes) -> str:
    """Return the name in a member's header, with the prefix that ustar moves from a long path; it may be cut short."""
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""  # GNU has times there
    parts = (part.split(b"\0")[0].decode("utf-8", "replace") for part in (prefix, header[:100]))
    return "/".join(part for part in parts if part)


def _caption_of(text: bytes, is_json: bool, name: str) -> str:
    """Return the caption in a .txt or .json member. Raises ValueError with the name of its image."""
    try:
        caption = parse_json(text.decode("utf-8-sig"))["caption"] if is_json else text.decode("utf-8-sig").strip()
    except (ValueError, KeyError, TypeError):
        caption = 0
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{name}: its caption cannot be read; the shard changed after indexing")
    return caption or ""


def _shards_in(folder: Path) -> list[Path]:
    """Return the tars in a folder, in the order of their names; hidden files are none."""
    return sorted(shard.absolute() for shard in folder.glob("*.tar") if not shard.name.startswith("."))


def has_shards(folder: Path) -> bool:
    """Return whether a folder contains tar shards or an index."""
    return (folder / INDEX).is_file() or bool(_shards_in(folder))


def read_shards(path: Path) -> TarShardDataset:
    """Open the pairs of a tar, a folder of tars, or a glob of tars; a folder's index is used if it exists.

    Raises:
        ValueError: no shards; damaged shards; pairs without image or caption; or shards that changed after indexing.
            One message for all shards.
    """
    if (path / INDEX).is_file():
        return open_index(path)
    if path.is_dir():
        shards = _shards_in(path)
    elif path.exists() or not glob.has_magic(str(path)):
        shards = [path.absolute()]
    else:
        shards = [Path(name).absolute() for name in sorted(glob.glob(str(path)))]
    if not shards:
        hint = path_hint(path) or "; use a pairs file, a folder of shards or a glob"
        raise ValueError(f"{path}: no tar shard (*.tar) found{hint}")
    others = [shard for shard in shards if shard.suffix != ".tar" or shard.is_dir()]
    if others:
        raise ValueError(f"{path}: {others[0].name} is no tar shard, and globs are for shards; name each other file")
    if len(shards) > 1 and path.is_dir():
        logger.info(
            "%s: %d shards without an index; write it once with `mamo data index` for a faster start", path, len(shards)
        )
    tables = _tables(shards, workers=0)
    return TarShardDataset([str(shard) for shard in shards], [len(table) for table in tables], np.concatenate(tables))


def index_folder(folder: Path, workers: int = 0) -> TarShardDataset:
    """Write the index of a folder of shards with `workers` processes (0: in this process), and open it.

    Raises:
        ValueError: as `read_shards`, or `index.json` is another program's; no file is written.
    """
    shards = _shards_in(folder)
    if not shards:
        raise ValueError(f"{folder}: no tar shard (*.tar) found; use a folder of shards")
    _refuse_foreign_index(folder)
    tables = _tables(shards, workers)
    states = [shard.stat() for shard in shards]
    entries = [
        {"name": shard.name, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "pairs": len(table)}
        for shard, state, table in zip(shards, states, tables)
    ]
    (folder / INDEX).unlink(missing_ok=True)  # written last: its presence means that the table is complete
    temporary = folder / f".{TABLE}"
    with temporary.open("wb") as file:
        npy.write_array(file, np.concatenate(tables), allow_pickle=False)
    temporary.replace(folder / TABLE)
    temporary.write_text(json.dumps({"shards": entries}, indent=1), "utf-8")
    temporary.replace(folder / INDEX)
    return open_index(folder)


def open_index(folder: Path) -> TarShardDataset:
    """Open the pairs of an indexed folder.

    The headers of shards with another time than at indexing are read again, because a copied folder has new times.

    Raises:
        ValueError: the shards changed after indexing, or the index is not one of `index_folder`.
    """
    entries = _entries(folder)
    present = {shard.name for shard in _shards_in(folder)}
    missing = {entry["name"] for entry in entries} - present
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} indexed shards are missing ({', '.join(sorted(missing)[:3])}){_AGAIN}"
        )
    added = present - {entry["name"] for entry in entries}
    if added:
        raise ValueError(f"{folder}: {len(added)} shards are not indexed ({', '.join(sorted(added)[:3])}){_AGAIN}")
    states = [(folder / entry["name"]).stat() for entry in entries]
    for entry, state in zip(entries, states):
        if state.st_size != entry["bytes"]:
            size = f"{state.st_size} bytes, {entry['bytes']} at indexing"
            raise ValueError(f"{folder / entry['name']}: {size}: the shard was cut short or replaced{_AGAIN}")
    pairs = _open_mapped(folder)
    if pairs.first_row[-1] != len(pairs):
        raise ValueError(f"{folder / TABLE}: {len(pairs)} rows for {pairs.first_row[-1]} pairs{_AGAIN}")
    for number, (entry, state) in enumerate(zip(entries, states)):
        _check_rows(folder, pairs, number, state.st_size, is_copied=state.st_mtime_ns != entry["mtime_ns"])
    return pairs


def _check_rows(folder: Path, pairs: TarShardDataset, number: int, n_bytes: int, is_copied: bool) -> None:
    """Raise ValueError if the rows of a shard are not inside it or, if it was copied, are not those of its headers."""
    start, stop = int(pairs.first_row[number]), int(pairs.first_row[number + 1])
    shard = Path(pairs.shards[number])
    for first in range(start, stop, _CHUNK_ROWS):
        rows = pairs.rows[first : min(first + _CHUNK_ROWS, stop)]
        for member in ("image", "text"):
            offset, size = rows[f"{member}_offset"], rows[f"{member}_size"]
            if min(offset.min(), size.min()) < 0 or (offset + size).max() > n_bytes:
                raise ValueError(f"{folder / TABLE}: a row is outside of {shard.name}; run `mamo data index` again")
    if is_copied:
        found = _table_or_error(shard)
        if isinstance(found, str) or not np.array_equal(found, pairs.rows[start:stop]):
            raise ValueError(f"{shard}: was modified after indexing{_AGAIN}")
        logger.info("%s: copied after indexing; run `mamo data index` once for a faster start", shard)


def _refuse_foreign_index(folder: Path) -> None:
    """Raise ValueError if a complete JSON file of another program has the name of the index."""
    try:
        document = read_json(folder / INDEX)
    except ValueError:
        return  # missing, or cut short while it was written
    if not isinstance(document, dict) or "shards" not in document:
        raise ValueError(f"{folder / INDEX}: not an index of `mamo data index`; move it, or use the glob '*.tar'")


def _open_mapped(folder: Path) -> TarShardDataset:
    """Map the table of an indexed folder into memory, without checking the shards."""
    entries = _entries(folder)
    try:
        open_regular(folder / TABLE).close()
        rows = npy.open_memmap(folder / TABLE, mode="r")
    except (OSError, ValueError):
        raise ValueError(f"{folder / TABLE}: missing or cut short; run `mamo data index` again") from None
    if rows.dtype != ROW or rows.ndim != 1:
        raise ValueError(f"{folder / TABLE}: not a table of `mamo data index`; run it again")
    shards = [str(folder.absolute() / entry["name"]) for entry in entries]
    return TarShardDataset(shards, [entry["pairs"] for entry in entries], rows, folder.absolute())


def _entries(folder: Path) -> list[Values]:
    """Read the entries of an index. Raises ValueError if they are not those of `index_folder`."""
    try:
        document = read_json(folder / INDEX)
    except ValueError:
        raise ValueError(f"{folder / INDEX}: cannot be read; run `mamo data index` again") from None
    _refuse_foreign_index(folder)
    entries: list[Values] = document["shards"] if isinstance(document["shards"], list) else [document["shards"]]
    for number, entry in enumerate(entries):
        for key in _ENTRY:
            value: Any = entry.get(key) if isinstance(entry, dict) else None
            if key == "name":
                is_good = isinstance(value, str) and Path(value).name == value
            else:
                is_good = type(value) is int and (key == "mtime_ns" or 0 <= value < 2**62)
            if not is_good:
                raise ValueError(f"{folder / INDEX}: entry {number}: {key}: not valid; run `mamo data index` again")
    return entries


def _tables(shards: Sequence[Path], workers: int) -> list[Rows]:
    """Read the rows of each shard. Raises ValueError with the errors of the first ten bad shards."""
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; this process handles it
        n_workers = min(workers, len(shards))
        with concurrent.futures.ProcessPoolExecutor(n_workers, context, signal.signal, ignore_interrupts) as pool:
            results = list(pool.map(_table_or_error, shards, chunksize=1))
    else:
        results = [_table_or_error(shard) for shard in shards]
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        more = f"; and {len(errors) - 10} more shards" if len(errors) > 10 else ""
        raise ValueError("; ".join(errors[:10]) + more)
    return [result for result in results if not isinstance(result, str)]


def _table_or_error(shard: Path) -> Rows | str:
    """Read the rows of one shard, or return the error message."""
    try:
        return _table(shard)
    except ValueError as error:
        return str(error)


def _table(shard: Path) -> Rows:
    """Read the rows of one shard. Raises ValueError with the bad pairs."""
    groups: dict[str, dict[str, ShardMember]] = {}
    repeated: list[str] = []
    for member in index_shard(shard):
        folder, _, name = member.name.rpartition("/")
        if name.startswith("._"):  # macOS's attributes of another member
            continue
        key, _, suffix = name.partition(".")
        group = groups.setdefault(f"{folder}/{key}".lstrip("/") if key else member.name, {})
        if suffix.lower() in group:
            repeated.append(member.name)
        group[suffix.lower()] = member
    errors, rows = ErrorCollector(shard), []
    for name in repeated:
        errors.add(0, f"{_printable(name)} occurs twice; keep one")
    for line, (name, members) in enumerate(groups.items(), 1):
        key = _printable(name)
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        try:
            text, is_failed = _caption_member(members)
            if image is not None and image.size > MAX_MEMBER_BYTES:
                raise ValueError(f"the image has {image.size} bytes, over the limit of {MAX_MEMBER_BYTES}")
        except ValueError as error:
            errors.add(line, f"{key}: {error}")
            continue
        if image is not None and text is not None:
            rows.append((image.offset, image.size, text.offset, text.size, text is members.get("json")))
        elif not is_failed:
            errors.add(line, f"{key}: no image for this caption (.{', .'.join(IMAGE_SUFFIXES)}); {_found(members)}")
    errors.raise_if_any()
    return np.array(rows, dtype=ROW)


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")


def _found(members: dict[str, ShardMember]) -> str:
    return f"found {', '.join(f'.{_printable(suffix)}' for suffix in members)}"


def _read_text(members: dict[str, ShardMember], suffix: str) -> str:
    """Read a text member. Raises ValueError if it is too large or not UTF-8."""
    member = members[suffix]
    if member.size > _MAX_TEXT_BYTES:
        raise ValueError(f"the .{suffix} member has {member.size} bytes, over the limit of {_MAX_TEXT_BYTES}")
    try:
        return read_member(member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the .{suffix} member is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _caption_member(members: dict[str, ShardMember]) -> tuple[ShardMember | None, bool]:
    """Return the member with the caption, and whether the download failed (then the image may be missing)."""
    try:
        details: Any = parse_json(_read_text(members, "json")) if "json" in members else {}
    except JsonError as error:
        raise ValueError(f"the .json member: {error}") from None
    if not isinstance(details, dict):
        raise ValueError("the .json member must be an object")
    is_failed = details.get("status", "success") != "success"
    if "txt" in members:
        _read_text(members, "txt")
        return members["txt"], is_failed
    caption = details.get("caption", 0)
    if caption is not None and not isinstance(caption, str):
        add = "add a .txt member or a 'caption' string to the .json member"
        raise ValueError(f"no caption: {add}; {_found(members)}")
    return members["json"], is_failed
