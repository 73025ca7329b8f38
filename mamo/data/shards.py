"""Pairs in tar shards with img2dataset's layout (`KEY.jpg` with `KEY.txt` or `KEY.json`), without extraction.

A table with 37 bytes a pair contains the offsets of image, caption and JSON (259 MB for seven million pairs). The index
of a folder is a file that all loader workers map into memory. A pair becomes a Python object only when it is loaded.
`index_folder` writes the index once. Without an index, every start reads every header of every tar.

Captions are the lines of `.txt`, or without one the text or list `caption` of `.json`. `.json` is read in place of a
`.txt` that is blank, whose lines are one caption there, or whose pair has an `image_id` there.

The training order is one permutation of all pairs (`sampler.epoch_order`), not a shuffle window over shards. Samples of
a window would be similar, because neighbours in a shard come from the same crawl, and the order would depend on the
division into shards. The cost is one short random read for each image. Spinning disks (about 100 random reads a second)
are therefore too slow for shards.
"""

import concurrent.futures
import functools
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.lib import format as npy
from numpy.lib.recfunctions import repack_fields
from numpy.typing import NDArray

from mamo.config.values import Values
from mamo.data.captions import CAPTION, CaptionKeys, texts_of, weighted_captions
from mamo.data.errors import ErrorCollector
from mamo.data.files import JsonError, open_regular, parse_json, path_hint, read_json
from mamo.data.output import OutputFolder
from mamo.data.pair_record import PairRecord
from mamo.data.remote import read_file, read_range, remote_url
from mamo.data.shard_index import MAX_MEMBER_BYTES, ShardMember, index_parts, read_member

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
_CAPTION_FIELDS = [
    ("image_offset", "<i8"), ("image_size", "<i4"), ("text_offset", "<i8"), ("text_size", "<i4"), ("is_json", "?"),
]  # fmt: skip
ROW = np.dtype([*_CAPTION_FIELDS, ("json_offset", "<i8"), ("json_size", "<i4")])
"""The caption is in `text`; `json` is the whole `.json` member, of size 0 without one."""
INDEX, TABLE = "index.json", "index.npy"
"""Files in a folder of shards: names, sizes and times of the shards; one `ROW` for each pair, in shard order."""
_HEADER_BYTES = 512
_MAX_TEXT_BYTES = 2**24
_ENTRY = ("name", "bytes", "mtime_ns", "pairs", "captions")
TXT = ".txt"
"""Key of the captions of `.txt` members in the counts of captions."""
_AGAIN = "; run `mamo data index` again when the shards are complete"
_CHUNK_ROWS = 2**20
_GAP_BYTES = 2**16
"""Bytes between the members of a pair on another machine that are read rather than asked for twice."""
_MOST_KEYS = 1000
"""Keys of captions that an index counts in each shard, the most frequent ones."""
Rows = NDArray[np.void]
Most = dict[str, int]
"""Key of captions -> the largest number of them that a pair has."""


class TarShardDataset(Sequence[PairRecord]):
    """Sequence of the pairs of some shards, in shard order. Pairs are read on access.

    Args:
        shards: absolute paths.
        counts: number of pairs in each shard.
        rows: [sum of counts] of `ROW`.
        most: the largest number of captions of a pair, by key.
        folder: the indexed folder, from which other processes open the same table; None without an index.
        keys: fields of the captions with their weights, see `with_keys`.
        url: of the folder of the shards, if they are on another machine; `folder` then has the index only.
    """

    def __init__(
        self,
        shards: Sequence[str],
        counts: Sequence[int],
        rows: Rows,
        most: Most,
        folder: Path | None = None,
        keys: CaptionKeys | None = None,
        url: str | None = None,
    ) -> None:
        self.shards = list(shards)
        self.first_row = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        self.rows = rows
        self.most = most
        self.folder = folder
        self.url = url
        self.keys = dict(keys or {CAPTION: 1.0})

    def with_keys(self, keys: CaptionKeys) -> "TarShardDataset":
        """Return the same pairs with the captions of other fields.

        The fields are those of the `.json` members. The lines of a `.txt` are captions of the key `caption` where the
        pair's `.json` has none of the fields.

        Raises:
            ValueError: a key that no pair has.
        """
        known = {*self.most, *([CAPTION] if TXT in self.most else [])}
        absent = [key for key, weight in keys.items() if weight and key not in known]
        if absent and len(self):
            place = self.url or self.folder or self.shards[0]
            raise ValueError(f"{place}: no pair has the caption key {absent[0]!r}; correct data.caption_keys")
        counts = np.diff(self.first_row).tolist()
        return TarShardDataset(self.shards, counts, self.rows, self.most, self.folder, keys, self.url)

    @property
    def reads_json(self) -> bool:
        """Return whether captions are those of other fields than `caption`."""
        return set(self.keys) != {CAPTION}

    @property
    def most_captions(self) -> int:
        """Return the largest number of captions of a pair."""
        if not self.reads_json:
            return max(self.most.get(CAPTION, 1), self.most.get(TXT, 1))
        return max(sum(self.most.get(key, 0) for key in self.keys), self.most.get(TXT, 1))

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
        image_offset, is_json = int(row["image_offset"]), bool(row["is_json"])
        member = "text"
        if self.reads_json and row["json_size"]:
            member, is_json = "json", True
        offset, size = int(row[f"{member}_offset"]), int(row[f"{member}_size"])
        spans = ((image_offset - _HEADER_BYTES, _HEADER_BYTES), (offset, size), (image_offset, int(row["image_size"])))
        header, text, *content = _read_spans(shard, spans)
        name = _name_in(header)
        if len(text) != size:
            raise OSError(f"{shard}: the caption of {name} is cut off; the shard changed after indexing")
        image = ShardMember(shard, name, image_offset, int(row["image_size"]), *content)
        found, image_id = _content_of(text, is_json, str(image))
        captions, weights = self._captions(found, str(image))
        image_id = image_id or f"{image}@{image_offset}"  # a header may cut its name, or have "?" in it
        line = index - int(self.first_row[number]) + 1
        return PairRecord(image, captions or ("",), image_id, line, shard, weights=weights)

    def _captions(self, found: Values, name: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return captions and weights of a pair's text or JSON. Raises ValueError where they are no texts."""
        texts: dict[str, list[str]] = {}
        for key in self.keys:
            own = texts_of(found.get(key, found.get(TXT) if key == CAPTION else None))
            if own is None:
                raise ValueError(f"{name}: its {key} cannot be read; the shard changed after indexing")
            texts[key] = own
        return weighted_captions(texts, self.keys)

    def __reduce__(self) -> Any:
        """Pickle the path of the index instead of the table, for loader workers."""
        if self.folder is not None:
            return _open_mapped, (self.folder, self.keys, self.url)
        return TarShardDataset, (
            self.shards, np.diff(self.first_row).tolist(), self.rows, self.most, None, self.keys
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names and tables of the shards, and of caption keys; the shards are not read."""
        names = "\n".join(Path(shard).name for shard in self.shards)
        digest = hashlib.sha256(names.encode("utf-8", "replace") + self.first_row.tobytes())
        fields = [name for name, _ in _CAPTION_FIELDS]
        for first in range(0, len(self.rows), _CHUNK_ROWS):
            rows: Any = repack_fields(self.rows[first : first + _CHUNK_ROWS][fields])
            digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
        if self.reads_json:
            digest.update(json.dumps(self.keys).encode())
        return digest.hexdigest()


def _read_spans(shard: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read header, text and, of a remote shard, the image of a pair, each (offset, size).

    One request reads them all where they are close to each other, as in most shards.
    """
    if remote_url(shard) is None:
        with open_regular(Path(shard)) as file:
            found = []
            for offset, size in spans[:2]:
                file.seek(offset)
                found.append(file.read(size))
            return found
    start, end = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
    if end - start > sum(size for _, size in spans) + _GAP_BYTES:
        return [read_range(shard, offset, size) for offset, size in spans]
    whole = read_range(shard, start, end - start)
    return [whole[offset - start : offset - start + size] for offset, size in spans]


def _name_in(header: bytes) -> str:
    """Return the name in a member's header, with the prefix that ustar moves from a long path; it may be cut short."""
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""  # GNU has times there
    parts = (part.split(b"\0")[0].decode("utf-8", "replace") for part in (prefix, header[:100]))
    return "/".join(part for part in parts if part)


def _content_of(text: bytes, is_json: bool, name: str) -> tuple[Values, str]:
    """Return the fields of a .json member, or the lines of a .txt as `TXT`; and the image id, "" without one.

    Raises:
        ValueError: it is damaged; the message has the name of its image.
    """
    try:
        if not is_json:
            return {TXT: lines_of(text.decode("utf-8-sig"))}, ""
        found: Values = parse_json(text.decode("utf-8-sig"))
        image_id = found.get("image_id")
    except (ValueError, AttributeError):
        raise ValueError(f"{name}: its caption cannot be read; the shard changed after indexing") from None
    return found, str(image_id) if _is_id(image_id) else ""


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def lines_of(text: str) -> list[str]:
    """Return the lines of a .txt member that are not blank, each a caption."""
    return [line.strip() for line in re.split("[\r\n]", text) if line.strip()]


def _shards_in(folder: Path) -> list[Path]:
    """Return the tars in a folder, in the order of their names; hidden files are none."""
    return sorted(shard.absolute() for shard in folder.glob("*.tar") if not shard.name.startswith("."))


def has_shards(folder: Path) -> bool:
    """Return whether a folder contains tar shards or an index."""
    return (folder / INDEX).is_file() or bool(_shards_in(folder))


def read_shards(path: Path, keys: CaptionKeys | None = None) -> TarShardDataset:
    """Open the pairs of a tar, a folder of tars, or a glob of tars; a folder's index is used if it exists.

    Args:
        path: of them.
        keys: fields of the captions with their weights; `caption` by default.

    Raises:
        ValueError: no shards; damaged shards; pairs without image or caption; a caption key that no pair has; or shards
            that changed after indexing. One message for all shards.
    """
    pairs = _open_shards(path, keys or {CAPTION: 1.0})
    return pairs if keys is None else pairs.with_keys(keys)


def _open_shards(path: Path, keys: CaptionKeys) -> TarShardDataset:
    url = remote_url(path)
    if url is not None and not url.endswith(".tar"):
        return _open_remote(url.rstrip("/"))
    if url is not None:
        tables, most = _tables([path], workers=0, keys=tuple(keys))
        return TarShardDataset([url], [len(tables[0])], tables[0], most[0])
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
    tables, most = _tables(shards, workers=0, keys=tuple(keys))
    counts = [len(table) for table in tables]
    return TarShardDataset([str(shard) for shard in shards], counts, np.concatenate(tables), _largest(most))


def _open_remote(url: str) -> TarShardDataset:
    """Open an indexed folder on another machine; its index is kept in the cache folder of the user.

    Raises:
        ValueError: there is no index, or it is not one of `mamo data index`.
    """
    try:
        content = read_file(f"{url}/{INDEX}")
    except ValueError as error:
        raise ValueError(
            f"{error}; run `mamo data index` in the folder of the shards before it is copied there"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamo" / "indexes"
    folder = cache / hashlib.sha256(url.encode() + content).hexdigest()[:24]
    if not (folder / INDEX).is_file():
        table = read_file(f"{url}/{TABLE}")
        with OutputFolder(folder, overwrite=True) as output:
            output.path(TABLE).write_bytes(table)
            output.path(INDEX).write_bytes(content)
    pairs = _open_mapped(folder, url=url)
    if pairs.first_row[-1] != len(pairs):
        raise ValueError(f"{url}/{TABLE}: {len(pairs)} rows for {pairs.first_row[-1]} pairs{_AGAIN}")
    for number, entry in enumerate(_entries(folder)):
        _check_rows(folder, pairs, number, entry["bytes"], is_copied=False)
    return pairs


def _largest(counts: Sequence[Most]) -> Most:
    """Return the largest number of each key."""
    return {key: max(count.get(key, 0) for count in counts) for key in {key for count in counts for key in count}}


def index_folder(folder: Path, workers: int = 0, keys: Sequence[str] = (CAPTION,)) -> TarShardDataset:
    """Write the index of a folder of shards with `workers` processes (0: in this process), and open it.

    Each pair needs a caption under one of the `keys`; the index serves any of them.

    Raises:
        ValueError: as `read_shards`, or `index.json` is another program's; no file is written.
    """
    shards = _shards_in(folder)
    if not shards:
        raise ValueError(f"{folder}: no tar shard (*.tar) found; use a folder of shards")
    _refuse_foreign_index(folder)
    tables, most = _tables(shards, workers, keys)
    write_index(folder, shards, tables, most)
    return open_index(folder)


def write_index(folder: Path, shards: Sequence[Path], tables: Sequence[Rows], most: Sequence[Most]) -> None:
    """Write the index of a folder.

    Args:
        folder: holds the shards.
        shards: complete ones, in the order of their names.
        tables: the rows of each.
        most: the largest numbers of captions of a pair of each, by key.
    """
    states = [shard.stat() for shard in shards]
    entries = [
        dict(zip(_ENTRY, (shard.name, state.st_size, state.st_mtime_ns, len(table), counts)))
        for shard, state, table, counts in zip(shards, states, tables, most)
    ]
    (folder / INDEX).unlink(missing_ok=True)  # written last: its presence means that the table is complete
    temporary = folder / f".{TABLE}"
    with temporary.open("wb") as file:
        npy.write_array(file, np.concatenate(tables), allow_pickle=False)
    temporary.replace(folder / TABLE)
    temporary.write_text(json.dumps({"shards": entries}, indent=1), "utf-8")
    temporary.replace(folder / INDEX)


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
        found = _table_or_error(shard, tuple(pairs.most))
        if isinstance(found, str) or not np.array_equal(found[0], pairs.rows[start:stop]):
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


def _open_mapped(folder: Path, keys: CaptionKeys | None = None, url: str | None = None) -> TarShardDataset:
    """Map the table of an indexed folder into memory, without checking the shards, which are in it or at a URL."""
    entries = _entries(folder)
    try:
        open_regular(folder / TABLE).close()
        rows = npy.open_memmap(folder / TABLE, mode="r")
    except (OSError, ValueError):
        raise ValueError(f"{folder / TABLE}: missing or cut short; run `mamo data index` again") from None
    if rows.dtype != ROW or rows.ndim != 1:
        raise ValueError(f"{folder / TABLE}: not a table of `mamo data index`; run it again")
    shards = [f"{url or folder.absolute()}/{entry['name']}" for entry in entries]
    counts, most = [entry["pairs"] for entry in entries], _largest([entry["captions"] for entry in entries])
    return TarShardDataset(shards, counts, rows, most, folder.absolute(), keys, url)


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
            elif key == "captions":
                is_good = isinstance(value, dict) and all(type(count) is int for count in value.values())
            else:
                is_good = type(value) is int and (key == "mtime_ns" or 0 <= value < 2**62)
            if not is_good:
                raise ValueError(f"{folder / INDEX}: entry {number}: {key}: not valid; run `mamo data index` again")
    return entries


def _tables(shards: Sequence[Path], workers: int, keys: Sequence[str] = (CAPTION,)) -> tuple[list[Rows], list[Most]]:
    """Read the rows of each shard, and the largest numbers of captions.

    Raises ValueError with the errors of the first ten bad shards.
    """
    read = functools.partial(_table_or_error, keys=tuple(keys))
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; this process handles it
        n_workers = min(workers, len(shards))
        with concurrent.futures.ProcessPoolExecutor(n_workers, context, signal.signal, ignore_interrupts) as pool:
            results = list(pool.map(read, shards, chunksize=1))
    else:
        results = [read(shard) for shard in shards]
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        more = f"; and {len(errors) - 10} more shards" if len(errors) > 10 else ""
        raise ValueError("; ".join(errors[:10]) + more)
    tables = [result for result in results if not isinstance(result, str)]
    return [rows for rows, _ in tables], [most for _, most in tables]


def _table_or_error(shard: Path, keys: Sequence[str]) -> tuple[Rows, Most] | str:
    """Read the rows of one shard, or return the error message."""
    try:
        return _table(shard, keys)
    except ValueError as error:
        return str(error)


def _table(shard: Path, keys: Sequence[str]) -> tuple[Rows, Most]:
    """Read the rows of one shard, each with a caption under one of the keys. Raises ValueError with the bad pairs."""
    errors, rows, most = ErrorCollector(shard), [], Counter[str]()
    groups, repeated = _groups(shard)
    for name in repeated:
        errors.add(0, f"{_printable(name)} occurs twice; keep one")
    for line, (name, members) in enumerate(groups.items(), 1):
        key = _printable(name)
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        try:
            text, is_failed, counts = _caption_member(members, keys)
            if image is not None and image.size > MAX_MEMBER_BYTES:
                raise ValueError(f"the image has {image.size} bytes, over the limit of {MAX_MEMBER_BYTES}")
        except ValueError as error:
            errors.add(line, f"{key}: {error}")
            continue
        if image is not None and text is not None:
            document = members.get("json")
            place = (0, 0) if document is None else (document.offset, document.size)
            rows.append((image.offset, image.size, text.offset, text.size, text is document, *place))
            most |= counts
        elif not is_failed:
            errors.add(line, f"{key}: no image for this caption (.{', .'.join(IMAGE_SUFFIXES)}); {_found(members)}")
    errors.raise_if_any()
    return np.array(rows, dtype=ROW), dict(most.most_common(_MOST_KEYS))


def _groups(shard: Path) -> tuple[dict[str, dict[str, ShardMember]], list[str]]:
    """Return the members of each pair by suffix, and the names that occur twice; joined tars may share names."""
    groups: dict[str, dict[str, ShardMember]] = {}
    repeated: list[str] = []
    for number, members in enumerate(index_parts(shard)):
        for member in members:
            folder, _, name = member.name.rpartition("/")
            if name.startswith("._"):  # macOS's attributes of another member
                continue
            key, _, suffix = name.partition(".")
            key = f"{folder}/{key}".lstrip("/") if key else member.name
            group = groups.setdefault(f"{key} of joined tar {number + 1}" if number else key, {})
            if suffix.lower() in group:
                repeated.append(member.name)
            group[suffix.lower()] = member
    return groups, repeated


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


def _caption_member(members: dict[str, ShardMember], keys: Sequence[str]) -> tuple[ShardMember | None, bool, Most]:
    """Return the member with the caption, whether the download failed (then the image may be missing), and counts.

    The counts are those of the lines of .txt, and of the texts in each field of .json.
    """
    try:
        details: Any = parse_json(_read_text(members, "json")) if "json" in members else {}
    except JsonError as error:
        raise ValueError(f"the .json member: {error}") from None
    if not isinstance(details, dict):
        raise ValueError("the .json member must be an object")
    is_failed = details.get("status", "success") != "success"
    counts = {key: len(texts) for key, value in details.items() if (texts := texts_of(value))}
    own = texts_of(details.get(CAPTION))
    if "txt" in members:
        text = _read_text(members, "txt")
        lines = lines_of(text)
        counts |= {TXT: len(lines)} if lines else {}
        is_one = len(lines) > 1 and own == [text.strip()]
        is_better = bool(own) and (not lines or is_one or _is_id(details.get("image_id")))
        return members["json" if is_better else "txt"], is_failed, counts
    if all(key not in details for key in keys) or any(texts_of(details.get(key)) is None for key in keys):
        wanted = "a 'caption' string" if tuple(keys) == (CAPTION,) else f"one of the caption keys {', '.join(keys)}"
        raise ValueError(f"no caption: add a .txt member or {wanted} to the .json member; {_found(members)}")
    return members["json"], is_failed, counts
