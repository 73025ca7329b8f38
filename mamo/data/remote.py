"""Files on other machines, read through fsspec: by `s3://`, `hf://`, `http://` and the like."""

import functools
import re
from pathlib import Path
from typing import IO, Any, cast

_URL = re.compile(r"(?!file:)([a-z][a-z0-9+.-]+):/+(.+)")
_TRIES = 3


def remote_url(path: Path | str) -> str | None:
    """Return the URL that a path is, also one whose slashes `Path` joined; None for a local path."""
    found = _URL.fullmatch(str(path))
    return f"{found[1]}://{found[2]}" if found else None


def read_range(url: str, start: int, size: int) -> bytes:
    """Read `size` bytes from byte `start` on, in one request; a failed one is repeated.

    Raises:
        OSError: the file cannot be read, is shorter, or the server does not send ranges.
    """
    system = _file_system(url)
    for attempt in range(_TRIES):
        try:
            content: bytes = system.cat_file(url, start=start, end=start + size)
            break
        except Exception as error:  # each system has errors of its own
            if attempt + 1 == _TRIES or isinstance(error, FileNotFoundError):
                raise OSError(f"{url}: {_reason(error)}") from None
    if len(content) > size:
        raise OSError(f"{url}: the server sends whole files, not ranges of bytes; use another, or copy the files")
    return content


def read_file(url: str) -> bytes:
    """Read a whole file. Raises ValueError with the reason where it cannot be read."""
    try:
        return cast(bytes, _file_system(url).cat_file(url))
    except Exception as error:
        raise ValueError(f"{url}: {_reason(error)}") from None


def open_remote(url: str) -> IO[bytes]:
    """Open a file for reading with seeks; parts that are read are kept. Raises OSError with the reason."""
    try:
        return cast(IO[bytes], _file_system(url).open(url, "rb"))
    except Exception as error:
        raise OSError(f"{url}: {_reason(error)}") from None


@functools.cache
def _system_of(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        needed = re.search(r"[Ii]nstall (\w+)", str(error))
        name = needed[1] if needed else "the fsspec package of it"
        raise ValueError(
            f"{protocol}:// needs {name} to be read; install it with `pip install mamo[remote]` or by its name"
        ) from None
    except ValueError:
        raise ValueError(f"{protocol}:// is no kind of URL that fsspec reads; copy the files, or mount them") from None


def _file_system(url: str) -> Any:
    return _system_of(url.partition("://")[0])


def _reason(error: Exception) -> str:
    """Return one short line about an error."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    lines = str(error).splitlines()
    return f"cannot be read ({type(error).__name__}: {lines[0][:120]})" if lines else type(error).__name__
