"""Bounded reading of files that others wrote, and one clear error for each that cannot be read.

Only regular files are read: a FIFO would block for ever, and a device has no end. JSON is bounded in its nesting and in
the length of its integers.
"""

import contextlib
import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

from mamo.config.values import Values
from mamo.data.formats import name_binary

_MAX_DEPTH = 500
"""Nesting at which a document is called too deep; Python's parser fails somewhat later."""
_LONGEST = 60
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_PATH_HINTS = (
    (r"(^|/)file:/", "write the path without file://"),
    (r"(^|/)[a-z][a-z0-9+.-]+:/", "of URLs only tar shards are read; download the file first"),
    (r"\\", r"write the path with / in place of \ "),
    (r"\{\w+\.\.\w+\}", "write a glob, such as [0-9] or *, in place of {0..9}"),
    (r"(^|/)~", "~ is not expanded here; write the whole path"),
    (r"\$\{?\w", "variables are not expanded here; write the whole path"),
)


class JsonError(ValueError):
    """Text that is not JSON, is too deep, or has too long an integer or a repeated key. `line` is 1-based."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line

    def advise(self, remedy: str) -> str:
        """Return the message with a remedy; that of a repeated key has its own."""
        return str(self) if isinstance(self, RepeatedKeyError) else f"{self}; {remedy}"


class RepeatedKeyError(JsonError):
    """A key that occurs twice in one object, of which Python's parser would keep the last value."""


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; a FIFO, socket or device is refused before it is read.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file but a pipe, socket or device", str(path))


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes. Raises OSError as `open_regular`, and where it is larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"{max(size, len(content))} bytes are over the limit of {max_bytes}", str(path))
    return content


def read_text(path: Path, hint: str = "") -> str:
    """Read a regular UTF-8 file, with or without a byte order mark; line ends become line feeds.

    Args:
        path: the file.
        hint: appended to the message if the file cannot be read; says how to fix it.

    Raises:
        ValueError: the file cannot be read, is too large for the memory, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
        name = name_binary(content[:512])
        if name:
            raise ValueError(f"{path}: {name}")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from None
    except MemoryError:
        raise ValueError(f"{path}: does not fit into the memory; split it into several files") from None
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            hint = "; name a file in it"
        raise ValueError(f"{path}: cannot be read: {error.strerror}{hint}{path_hint(path)}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def path_hint(path: Path | str) -> str:
    """Return "; REMEDY" for a path in a notation that is not read (URL, backslashes, {0..9}, ~), else ""."""
    return next((f"; {remedy}".rstrip() for form, remedy in _PATH_HINTS if re.search(form, str(path))), "")


def parse_json(text: str) -> Any:
    """Parse a JSON document. Raises JsonError with the reason and the line in `text`, for a repeated key too."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RepeatedKeyError as error:
        raise RepeatedKeyError(str(error), _line_of_repeat(text)) from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON ({error.msg}, column {error.colno})", error.lineno) from None
    except RecursionError:
        raise JsonError("not valid JSON (nested too deeply)", _line_too_deep(text)) from None
    except ValueError:  # Python refuses to convert long integers
        found = re.search(r"\d{4300}", text)
        line = text.count("\n", 0, found.start() if found else 0) + 1
        raise JsonError("not valid JSON (an integer has thousands of digits)", line) from None


def _unique(pairs: list[tuple[str, Any]]) -> Values:
    """Return the object of some keys and values. Raises RepeatedKeyError, without the line."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"key {brief(repeated)} occurs twice in one object; keep one", 1)
    return found


def _line_of_repeat(text: str) -> int:
    """Return the line at which the first object with a repeated key ends; objects are made in the order of their }."""
    closing = (token.start() for token in _TOKEN.finditer(text) if token.group() == "}")
    end = 0

    def check(pairs: list[tuple[str, Any]]) -> Values:
        nonlocal end
        end = next(closing)
        return _unique(pairs)

    with contextlib.suppress(RepeatedKeyError):
        json.loads(text, object_pairs_hook=check)
    return text.count("\n", 0, end) + 1


def _line_too_deep(text: str) -> int:
    """Return the line at which brackets nest deeper than `_MAX_DEPTH`."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > _MAX_DEPTH:
            return text.count("\n", 0, token.start()) + 1
    return 1


def read_json(path: Path, hint: str = "") -> Any:
    """Read a JSON file. Raises ValueError as `read_text`, and with file, line and reason where it is not JSON."""
    try:
        return parse_json(read_text(path, hint))
    except JsonError as error:
        raise ValueError(f"{path}:{error.line}: {error}") from None


def brief(value: object) -> str:
    """Format a JSON value for a message, in one line of at most 60 characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple) and (
        len(value) > 6 or any(isinstance(item, dict | list | tuple) for item in value)
    ):
        return f"a list of {len(value)}"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # a value from elsewhere than JSON
        text = ascii(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def brief_names(names: list[str]) -> str:
    """Format names for a message: the first five, each quoted and cut."""
    shown = ", ".join(repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...") for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
