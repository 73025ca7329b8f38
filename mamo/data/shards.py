"""Pairs in tar shards of img2dataset's layout (`KEY.jpg` beside `KEY.txt` or `KEY.json`), without extracting them.

A table of 25 bytes a pair says where the image and the caption of each lie; seven million pairs are 175 MB in all: the
index of a folder is a file that all loader processes map into memory, and no Python object exists for a pair until it
is loaded. `index_folder` writes it once; without it the table is made anew at every start, which takes as long as
reading every header of every tar.

The order of training stays one permutation of all pairs (`sampler.epoch_order`) rather than shards in turn with a
window shuffled: neighbours in a shard come from the same crawl, so batches of a window would be alike, and the order
would depend on how the data was cut into shards. The price is a short read at a random place for each image; a disk
that cannot do as many a second as training sees images (spinning disks do about 100) should not hold the shards.
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

from mamo.data.pair_record import ErrorCollector, PairRecord
from mamo.data.shard_index import ShardMember, index_shard, read_member

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
ROW = np.dtype(
    [("image_offset", "<i8"), ("image_size", "<i4"), ("text_offset", "<i8"), ("text_size", "<i4"), ("is_json", "?")]
)
INDEX, TABLE = "index.json", "index.npy"
"""Files in a folder of shards: names, sizes and times of the shards; one `ROW` a pair, in the order of the shards."""
_HEADER_BYTES, _NAME_BYTES = 512, 100
Rows = NDArray[np.void]


class TarShardDataset(Sequence[PairRecord]):
    """The pairs of some shards, in the order of the shards; each is read when it is asked for.

    Args:
        shards: absolute paths.
        counts: number of pairs in each.
        rows: [sum of counts] of `ROW`.
        folder: the indexed folder, from which another process opens the same table; None where there is no index.
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
        """Pair `index`, read from its shard. Raises OSError where the shard is gone or shorter than before."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = self.rows[index]
        number = int(np.searchsorted(self.first_row, index, side="right")) - 1
        shard = self.shards[number]
        image_offset, text_size = int(row["image_offset"]), int(row["text_size"])
        with open(shard, "rb") as file:
            file.seek(image_offset - _HEADER_BYTES)
            name = file.read(_NAME_BYTES).split(b"\0")[0].decode("utf-8", "replace")
            file.seek(int(row["text_offset"]))
            text = file.read(text_size)
        if len(text) != text_size:
            raise OSError(f"{shard}: the caption of {name} is cut off; the shard changed after it was indexed")
        if len(name) == _NAME_BYTES:  # a longer name is cut there
            name = f"{name}@{image_offset}"
        image = ShardMember(shard, name, image_offset, int(row["image_size"]))
        caption = (json.loads(text)["caption"] or "") if row["is_json"] else text.decode("utf-8").strip()
        return PairRecord(image, (caption,), str(image), index - int(self.first_row[number]) + 1, shard)

    def __reduce__(self) -> Any:
        """To a loader process: where the table is rather than what is in it."""
        if self.folder is not None:
            return _attached, (self.folder,)
        return TarShardDataset, (self.shards, np.diff(self.first_row).tolist(), self.rows)

    def fingerprint(self) -> str:
        """Hex digits that change with the pairs: of the names and tables of the shards, none of which is read."""
        names = "\n".join(Path(shard).name for shard in self.shards)
        digest = hashlib.sha256(names.encode("utf-8", "replace") + self.first_row.tobytes())
        digest.update(np.ascontiguousarray(self.rows).view(np.uint8).data)
        return digest.hexdigest()


def read_shards(path: Path) -> TarShardDataset:
    """The pairs of a tar, a folder of tars, or a glob of them; a folder's index is used where there is one.

    Raises:
        ValueError: there is none; a shard is damaged or has a pair without image or caption; a shard is not what was
            indexed. One message that names the shards.
    """
    if (path / INDEX).is_file():
        return open_index(path)
    pattern = str(path / "*.tar") if path.is_dir() else str(path)
    found = sorted(glob.glob(pattern)) or (
        [str(path)] if path.suffix == ".tar" and not glob.has_magic(str(path)) else []
    )
    if not found:
        raise ValueError(f"{path}: no tar shard there (*.tar); give a pairs file, a folder of shards or a glob")
    if len(found) > 1 and path.is_dir():
        logger.info("%s: %d shards without index; write it once with `data.py index`", path, len(found))
    shards = [Path(shard).absolute() for shard in found]
    tables = _tables(shards, workers=0)
    return TarShardDataset([str(shard) for shard in shards], [len(table) for table in tables], np.concatenate(tables))


def index_folder(folder: Path, workers: int = 0) -> TarShardDataset:
    """Write the index of a folder of shards, by so many processes (0: by this one).

    Raises:
        ValueError: as `read_shards`; nothing is written then.
    """
    shards = sorted(folder.absolute().glob("*.tar"))
    if not shards:
        raise ValueError(f"{folder}: no tar shard there (*.tar); give a folder of shards")
    tables = _tables(shards, workers)
    states = [shard.stat() for shard in shards]
    entries = [
        {"name": shard.name, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "pairs": len(table)}
        for shard, state, table in zip(shards, states, tables)
    ]
    (folder / INDEX).unlink(missing_ok=True)  # first away and last to come: its presence says that the table is whole
    temporary = folder / f".{TABLE}"
    with temporary.open("wb") as file:
        npy.write_array(file, np.concatenate(tables), allow_pickle=False)
    temporary.replace(folder / TABLE)
    temporary.write_text(json.dumps({"shards": entries}, indent=1), "utf-8")
    temporary.replace(folder / INDEX)
    return open_index(folder)


def open_index(folder: Path) -> TarShardDataset:
    """The pairs of an indexed folder. Raises ValueError where its shards are not those that were indexed."""
    entries = _entries(folder)
    again = "; run `data.py index` again once the shards are whole"
    missing = {entry["name"] for entry in entries} - {shard.name for shard in folder.glob("*.tar")}
    if missing:
        raise ValueError(f"{folder}: {len(missing)} indexed shards are gone ({', '.join(sorted(missing)[:3])}){again}")
    added = {shard.name for shard in folder.glob("*.tar")} - {entry["name"] for entry in entries}
    if added:
        raise ValueError(f"{folder}: {len(added)} shards are not indexed ({', '.join(sorted(added)[:3])}){again}")
    for entry in entries:
        state = (folder / entry["name"]).stat()
        if state.st_size != entry["bytes"]:
            size = f"{state.st_size} bytes, {entry['bytes']} when it was indexed"
            raise ValueError(f"{folder / entry['name']}: {size}: it was cut short or replaced{again}")
        if state.st_mtime_ns != entry["mtime_ns"]:
            raise ValueError(f"{folder / entry['name']}: was written to after it was indexed{again}")
    pairs = _attached(folder)
    if pairs.first_row[-1] != len(pairs):
        raise ValueError(f"{folder / TABLE}: {len(pairs)} rows for {pairs.first_row[-1]} pairs{again}")
    return pairs


def _attached(folder: Path) -> TarShardDataset:
    """The pairs of an indexed folder, the table mapped into memory; the shards are taken to be those indexed."""
    entries = _entries(folder)
    try:
        rows = npy.open_memmap(folder / TABLE, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / TABLE}: cannot be read ({error}); run `data.py index` again") from None
    shards = [str(folder.absolute() / entry["name"]) for entry in entries]
    return TarShardDataset(shards, [entry["pairs"] for entry in entries], rows, folder.absolute())


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads((folder / INDEX).read_text("utf-8"))["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX}: cannot be read ({error}); run `data.py index` again") from None
    return entries


def _tables(shards: Sequence[Path], workers: int) -> list[Rows]:
    """The rows of each shard. Raises ValueError with the mistakes of all shards, the first ten of them whole."""
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; this process handles it
        n_workers = min(workers, len(shards))
        with concurrent.futures.ProcessPoolExecutor(n_workers, context, signal.signal, ignore_interrupts) as pool:
            results = list(pool.map(_table_or_problem, shards, chunksize=1))
    else:
        results = [_table_or_problem(shard) for shard in shards]
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        more = f"; and {len(problems) - 10} more shards" if len(problems) > 10 else ""
        raise ValueError("; ".join(problems[:10]) + more)
    return [result for result in results if not isinstance(result, str)]


def _table_or_problem(shard: Path) -> Rows | str:
    try:
        return _table(shard)
    except ValueError as error:
        return str(error)


def _table(shard: Path) -> Rows:
    groups: dict[str, dict[str, ShardMember]] = {}
    for member in index_shard(shard):
        folder, _, name = member.name.rpartition("/")
        key, _, suffix = name.partition(".")
        groups.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    problems, rows = ErrorCollector(shard), []
    for line, (key, members) in enumerate(groups.items(), 1):
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        try:
            text, is_failed = _caption_member(members)
        except ValueError as error:
            problems.add(line, f"{key.lstrip('/')}: {error}")
            continue
        if image is not None and text is not None:
            rows.append((image.offset, image.size, text.offset, text.size, text is members.get("json")))
        elif not is_failed:
            problems.add(line, f"{key.lstrip('/')}: no image beside its caption (.{', .'.join(IMAGE_SUFFIXES)})")
    problems.raise_if_any()
    return np.array(rows, dtype=ROW)


def _caption_member(members: dict[str, ShardMember]) -> tuple[ShardMember | None, bool]:
    """What holds a group's caption, and whether its JSON says that the download failed (then no image is expected)."""
    details: Any = json.loads(read_member(members["json"])) if "json" in members else {}
    if not isinstance(details, dict):
        raise ValueError("the .json member must be an object")
    is_failed = details.get("status", "success") != "success"
    if "txt" in members:
        read_member(members["txt"]).decode("utf-8")
        return members["txt"], is_failed
    caption = details.get("caption", 0)
    if caption is not None and not isinstance(caption, str):
        raise ValueError("no caption: add a .txt member or a 'caption' string to the .json member")
    return members["json"], is_failed
