"""Pairs of JSON Lines with random access: one pass checks every row, then a row is parsed when it is loaded.

The index has 16 bytes for every 32 rows, 2 MB for four million pairs, so that each loader process has its own. Rows
with the fields of the first one, in its order, are checked by one regular expression; all others by `RowReader`, whose
errors and records are those of both ways.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import numpy as np
from numpy.typing import NDArray

from mamo.config.values import Values
from mamo.data.captions import CAPTION, CaptionKeys
from mamo.data.errors import json_rows
from mamo.data.files import JsonError, open_regular, parse_json
from mamo.data.pair_record import Identities, PairRecord, data_set_of
from mamo.data.pair_rows import RowReader, is_plain_path

_BLOCK_BYTES = 2**22
_ROWS_A_STRIDE = 32
_LONGEST_FIRST_LINE = 2**24
_MARK = b"\xef\xbb\xbf"
_PLAIN = r'[^"\\\x00-\x1f]*+'
_TEXT = rf'"{_PLAIN}(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{{4}}){_PLAIN})*"'
_GAP = r"[ \t]*+"
_NUMBER = r"-?(?:0|[1-9]\d{0,17})(?:\.\d{1,30})?(?:[eE][+-]?\d{1,3})?"
_VALUES = {
    "image": rf'"(?!~)(?=\s*+[^\s"\\])({_PLAIN})"',
    CAPTION: rf"({_TEXT}|\[{_GAP}{_TEXT}(?:{_GAP},{_GAP}{_TEXT})*{_GAP}\])",
    "image_id": rf'("{_PLAIN}"|0|-?[1-9]\d{{0,17}})',
}
"""Field -> the values that need no further check. Paths and ids with escapes are left to `RowReader`."""
_OTHER_VALUE = rf"(?:{_TEXT}|{_NUMBER}|true|false|null)"
_PUBLISHED = ("coco", "COCO", "flickr30k", "2017/")
"""Words of which each name of a published data set's image or id has one."""


def is_json_lines(path: Path) -> bool:
    """Return whether the first line of a file with text is a row of JSON Lines; False where it cannot be read."""
    try:
        with open_regular(path) as file:
            line = b""
            while not line.strip(b" \t\r\n"):
                line = file.readline(_LONGEST_FIRST_LINE)
                if not line:
                    return False
        row = parse_json(line.removeprefix(_MARK).decode())
    except (OSError, UnicodeDecodeError, JsonError):
        return False
    return isinstance(row, dict) and "images" not in row


class LinePairs(Sequence[PairRecord]):
    """Sequence of the pairs of a JSON Lines file, in its order. Pairs are read on access.

    `most_captions` is the largest number of different captions of a pair, `has_foils` whether a pair has foils,
    `data_sets` the names as of `data_set_of`, `identities` those of all pairs until they are compared. `digest` is the
    SHA-256 of the file's bytes, with absolute paths made relative to its folder.

    Raises:
        ValueError: bad rows (the first ten and the number of others, each with file, line, field and fix), a caption
            key that no row has, or a file that cannot be read.
    """

    def __init__(self, path: Path, keys: CaptionKeys) -> None:
        self.path = path
        self.keys = dict(keys)
        self.most_captions = 0
        self.has_foils = False
        self.data_sets: set[str] = set()
        scan = _Scan(self)
        self.identities: Identities | None = (np.concatenate(scan.ids), np.concatenate(scan.image_paths))
        self.n_rows = scan.n_rows
        self.starts: NDArray[np.int64] = np.asarray([*scan.starts, scan.n_bytes], np.int64)
        self.first_lines: NDArray[np.int64] = np.asarray(scan.first_lines, np.int64)
        self.digest = scan.digest.hexdigest()
        self.reader = RowReader(path, keys)
        self.stamp = scan.stamp

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[PairRecord]:
        """Yield all pairs. Raises OSError as `__getitem__`."""
        for stride in range(len(self.first_lines)):
            yield from self._stride(stride)

    @overload
    def __getitem__(self, index: int) -> PairRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[PairRecord]: ...
    def __getitem__(self, index: int | slice) -> PairRecord | list[PairRecord]:
        """Read pair `index`. Raises OSError where the file is missing or was changed since the index was made."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        stride, at = divmod(range(len(self))[index], _ROWS_A_STRIDE)
        return self._stride(stride, at)[0]

    def _stride(self, stride: int, at: int | None = None) -> list[PairRecord]:
        """Return the pairs of a stride, or only that at place `at`."""
        start, end = self.starts[stride : stride + 2].tolist()
        with open_regular(self.path) as file:
            if _stamp(file) != self.stamp:
                raise OSError(f"{self.path} was changed while it was in use; start again")
            file.seek(start)
            lines = file.read(end - start).decode().split("\n")
        first = int(self.first_lines[stride])
        rows = [(first + i, line) for i, line in enumerate(lines) if line.strip()]
        chosen = rows if at is None else rows[at : at + 1]
        return [self.reader.record(line, self.reader.named(json.loads(text))) for line, text in chosen]

    def __getstate__(self) -> Values:
        """Leave out the identities: loader processes do not compare them."""
        return {**self.__dict__, "identities": None}

    def fingerprint(self) -> str:
        """Return a text that changes with the name or the content of the file, or with the caption keys."""
        keys = "" if set(self.keys) == {CAPTION} else json.dumps(self.keys)
        return f"{self.path.name}\t{self.digest}\t{keys}\n"


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


class _Scan:
    """One pass over a file: checks its rows, indexes them, and collects facts in `pairs`."""

    def __init__(self, pairs: LinePairs) -> None:
        self.pairs = pairs
        self.reader = RowReader(pairs.path, pairs.keys)
        self.digest = hashlib.sha256()
        self.starts: list[int] = []
        self.first_lines: list[int] = []
        self.n_rows = 0
        self.n_lines = 0
        self.n_bytes = 0
        self.folder = self.reader.prefix
        self.alike: _Alike | None = None
        self.ids: list[NDArray[np.int64]] = []
        self.image_paths: list[NDArray[np.int64]] = []
        try:
            with open_regular(pairs.path) as file:
                self.stamp = _stamp(file)
                if file.read(len(_MARK)) == _MARK:
                    self.n_bytes = len(_MARK)
                file.seek(self.n_bytes)
                for block in _blocks(file):
                    self._read_block(block)
        except OSError as error:
            raise ValueError(f"{pairs.path}: cannot be read: {error.strerror}") from None
        self.reader.finish(self.n_rows)

    def _read_block(self, block: bytes) -> None:
        """Read the next whole lines of the file."""
        self.digest.update(self._with_relative_paths(block))
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            at = self.n_bytes + error.start
            raise ValueError(
                f"{self.pairs.path}: not UTF-8 text ({error.reason} at byte {at}); convert it to UTF-8"
            ) from None
        lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        blank = self._check_lines(lines)
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
        places = np.concatenate([[0], ends])[: len(lines)]
        numbers = np.arange(len(lines))
        if blank:
            places, numbers = np.delete(places, blank), np.delete(numbers, blank)
        chosen = slice(-self.n_rows % _ROWS_A_STRIDE, None, _ROWS_A_STRIDE)
        self.starts += (places[chosen] + self.n_bytes).tolist()
        self.first_lines += (numbers[chosen] + self.n_lines + 1).tolist()
        self.n_rows += len(places)
        self.n_lines += len(lines)
        self.n_bytes += len(block)

    def _with_relative_paths(self, block: bytes) -> bytes:
        """Return rows whose absolute paths are relative to the file, so that moved data keep their fingerprint."""
        if b'"/' in block:
            folder = self.reader.folder
            for depth, parent in enumerate([folder, *folder.parents][:-1]):
                block = block.replace(b'"' + os.fsencode(parent) + b"/", b'"' + b"../" * depth)
        return block

    def _check_lines(self, lines: list[str]) -> list[int]:
        """Check the rows of some lines and add their facts; return the places of blank lines."""
        pairs, folder = self.pairs, self.folder
        if self.alike is None:
            self.alike = _Alike(next((line for line in lines if line.strip()), ""), self.reader)
        at_image, at_caption, at_id = self.alike.groups
        text = "\n".join(lines)
        may_be_published = any(word in text or word in folder for word in _PUBLISHED)
        blank, ids, image_paths, n_alike = list[int](), list[int](), list[int](), 0
        for at, groups in enumerate(self.alike.find(text, len(lines))):
            image = groups[at_image]
            if not image or not is_plain_path(image):
                if not lines[at].strip():
                    blank.append(at)
                    continue
                record = self._read_line(self.n_lines + at + 1, lines[at])
                if record is None:
                    continue
                image_id, path = record.image_id, str(record.image)
            else:
                n_alike += 1
                caption, own = groups[at_caption], groups[at_id]
                if caption[0] == "[":
                    pairs.most_captions = max(pairs.most_captions, len({*json.loads(caption)}))
                path = image if image[0] == os.sep else folder + image
                image_id = own.strip('"') if own else path
            ids.append(hash(image_id))
            image_paths.append(hash(path if ".." not in path else os.path.normpath(path)))
            head, _, rest = image_id.partition("/")
            is_plain = not may_be_published
            pairs.data_sets.add((head if head and rest else "other") if is_plain else data_set_of(image_id, path))
        self.ids.append(np.asarray(ids, np.int64))
        self.image_paths.append(np.asarray(image_paths, np.int64))
        if n_alike:
            pairs.most_captions = max(pairs.most_captions, 1)
            self.reader.absent.clear()
            self.reader.fields.ignored.update(dict.fromkeys(self.alike.unknown, n_alike))
        return blank

    def _read_line(self, number: int, line: str) -> PairRecord | None:
        """Return the record of a line; None for a bad one, whose errors are collected."""
        for _, value in json_rows([line], self.reader.errors, number):
            record = self.reader.read(number, value)
            if record is not None:
                self.pairs.most_captions = max(self.pairs.most_captions, len({*record.captions}))
                self.pairs.has_foils |= bool(record.foils)
            return record
        return None


class _Alike:
    """Regular expression of the rows with the fields of one row, in its order.

    `groups` are the places of image, captions and image id in what `find` returns; `unknown` the fields that are not
    read.
    """

    def __init__(self, line: str, reader: RowReader) -> None:
        self.pattern: re.Pattern[str] | None = None
        self.groups = (0, 1, 2)
        self.unknown: list[str] = []
        try:
            row = parse_json(line)
        except JsonError:
            return
        probe = RowReader(reader.path, reader.keys)
        if len(reader.keys) != 1 or probe.read(1, row) is None:
            return
        values = {**_VALUES, next(iter(reader.keys)): _VALUES[CAPTION]}
        fields = list(probe.named(row))
        self.unknown = list(probe.fields.ignored)
        if not {*fields} <= {*values, *self.unknown}:
            return  # foils and the like
        read = [field for field in fields if field in values]
        shown = [
            f"{re.escape(json.dumps(name, ensure_ascii=False))}{_GAP}:{_GAP}{values.get(field, _OTHER_VALUE)}{_GAP}"
            for name, field in zip(row, fields)
        ]
        self.pattern = re.compile(rf"^{_GAP}\{{{_GAP}{f',{_GAP}'.join(shown)}\}}{_GAP}()$|^.*$", re.MULTILINE)
        caption = next(iter(reader.keys))
        at_id = read.index("image_id") if "image_id" in read else len(read)
        self.groups = (read.index("image"), read.index(caption), at_id)

    def find(self, text: str, n_lines: int) -> list[tuple[str, ...]]:
        """Return the groups of each line, all empty for a line that does not match."""
        return [("", "", "")] * n_lines if self.pattern is None else self.pattern.findall(text)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield blocks of whole lines."""
    while lines := file.readlines(_BLOCK_BYTES):
        yield b"".join(lines)
