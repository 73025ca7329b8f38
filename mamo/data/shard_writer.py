"""Write tar shards of images and captions with their index, in one pass; image bytes are copied as they are."""

import concurrent.futures
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from typing_extensions import Buffer

from mamo.data.shards import ROW, Most, write_index

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_FORMATS = (
    (b"\xff\xd8\xff", 0, "jpg"), (b"\x89PNG\r\n\x1a\n", 0, "png"), (b"WEBP", 8, "webp"), (b"GIF8", 0, "gif"),
    (b"BM", 0, "bmp"), (b"II*\0", 0, "tif"), (b"MM\0*", 0, "tif"), (b"ftypavif", 4, "avif"),
    (b"\0\0\0\x0cjP  ", 0, "jp2"),
)  # fmt: skip
_MAX_BUFFERS = 1000
"""Buffers that one call writes, of at most 1,024 that the system takes."""
_MIN_BYTES = 2**20
"""Bytes that `flush` writes at least."""
_TEMPLATE = bytearray(_BLOCK)
_TEMPLATE[100:108] = b"0000644\0"
_TEMPLATE[108:124] = b"0000000\0" * 2  # user and group
_TEMPLATE[136:148] = b"00000000000\0"  # time
_TEMPLATE[148:156] = b" " * 8  # the checksum counts itself as spaces
_TEMPLATE[156:157] = b"0"
_TEMPLATE[257:265] = b"ustar\x0000"
_SUM = sum(_TEMPLATE)
_encode = json.JSONEncoder(ensure_ascii=False).encode


def image_suffix(content: Buffer) -> str:
    """Return the suffix of an encoded image by its first bytes, "" for another format."""
    start = bytes(memoryview(content)[:16])
    for magic, at, suffix in _FORMATS:
        if start.startswith(magic, at):
            return suffix
    return ""


def tar_header(name: str, size: int) -> bytes:
    """Return the ustar header of a regular file with a name of at most 100 ASCII characters."""
    header, own, length = _TEMPLATE.copy(), name.encode("ascii"), b"%011o\0" % size
    header[: len(own)] = own
    header[124:136] = length
    header[148:156] = b"%06o\0 " % (_SUM + sum(own) + sum(length))
    return bytes(header)


class ShardWriter:
    """Context manager that writes pairs into `00000.tar`, `00001.tar`, ... of a folder, and their index at its end.

    A shard begins anew where the next pair would make it larger than `shard_bytes`. A second thread writes, from each
    `flush` on: call it where the caller is about to read, so that both happen at once.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """Store the arguments; the folder exists and has no shards."""
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[Path] = []
        self.rows: list[list[tuple[int, int, int, int, bool, int, int]]] = []
        self.most: list[Counter[str]] = []
        self.n_pairs = 0
        self._file = -1
        self._position = 0
        self._written = 0
        self._waiting: list[Buffer] = []
        self._tail = b""  # what follows the image of the last pair
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the last shard and write the index; after an error only close the file."""
        try:
            if error is None:
                self._end_shard()
        finally:
            self._pool.shutdown()
            if self._file >= 0:
                os.close(self._file)
        if error is None:
            tables = [np.array(rows, dtype=ROW) for rows in self.rows]
            counts: list[Most] = [dict(most) for most in self.most]
            write_index(self.folder, self.shards, tables, counts)

    def add(self, image: Buffer, suffix: str, texts: Mapping[str, Sequence[str]], image_id: str | None) -> None:
        """Write one pair.

        Args:
            image: an encoded image; it must not change before the next pairs are written.
            suffix: of its format.
            texts: captions by key; one caption is written as a text, several as a list.
            image_id: the same for the same image; None for none.
        """
        fields: dict[str, object] = {key: found[0] if len(found) == 1 else found for key, found in texts.items()}
        fields |= {} if image_id is None else {"image_id": image_id}
        document = _encode(fields).encode("utf-8", "replace")
        n_bytes = memoryview(image).nbytes
        needed = 2 * _BLOCK + n_bytes + -n_bytes % _BLOCK + len(document) + -len(document) % _BLOCK
        if self._file < 0 or (self._position and self._position + needed + len(_END) > self.shard_bytes):
            self._end_shard()
            self._begin_shard()
        key = f"{self.n_pairs:09d}"
        self._waiting += [self._tail + tar_header(f"{key}.{suffix}", n_bytes), image]
        end = bytes(-len(document) % _BLOCK)
        self._tail = bytes(-n_bytes % _BLOCK) + tar_header(f"{key}.json", len(document)) + document + end
        at_image, at_text = self._position + _BLOCK, self._position + needed - len(end) - len(document)
        self._position += needed
        self.rows[-1].append((at_image, n_bytes, at_text, len(document), True, at_text, len(document)))
        for name, found in texts.items():
            self.most[-1][name] = max(self.most[-1][name], len(found))
        self.n_pairs += 1
        if len(self._waiting) >= _MAX_BUFFERS:
            self._write()

    def flush(self) -> None:
        """Begin to write what waits, if it is not little, once that before it is written. Raises OSError of that."""
        if self._position - self._written >= _MIN_BYTES:
            self._write()

    def _begin_shard(self) -> None:
        self.shards.append(self.folder / f"{len(self.shards):05d}.tar")
        self.rows.append([])
        self.most.append(Counter())
        self._file = os.open(self.shards[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = self._written = 0

    def _end_shard(self) -> None:
        if self._file >= 0:
            self._tail += _END
            self._write()
            self._wait()
            os.close(self._file)
            self._file = -1

    def _write(self) -> None:
        self._wait()
        self._writing = self._pool.submit(_write, self._file, [*self._waiting, self._tail])
        self._waiting, self._tail, self._written = [], b"", self._position

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _write(file: int, buffers: Sequence[Buffer]) -> None:
    """Write buffers to a file descriptor. Raises OSError, such as of a full disk."""
    parts = [memoryview(part).cast("B") for part in buffers if memoryview(part).nbytes]
    written = os.writev(file, parts)
    if written < sum(map(len, parts)):  # a system may write less than it is asked to
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            rest = rest[os.write(file, rest) :]
