"""Random access to the members of uncompressed tar shards, without extraction.

A tar file is a sequence of 512-byte headers, each followed by the bytes of its member. One pass over the headers yields
the offsets of all members. Reading a member then takes one seek and one read. The file is opened for every read, so a
`ShardMember` is plain data that any worker process can use.
"""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mamo.data.files import open_regular, path_hint
from mamo.data.remote import open_remote, read_range, remote_url

MAX_MEMBER_BYTES = 2**30
"""Largest member that is read; a larger one is no image."""
_CHUNK = 2**20
_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".txt", ".json",
)  # fmt: skip
"""Suffixes of members that are read; a link with one of them is not left out in silence."""


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A regular file in a tar: `size` bytes from byte `offset` of the file or URL `shard`.

    `content` holds them where they were read already.
    """

    shard: str
    name: str
    offset: int
    size: int
    content: bytes | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


def index_shard(shard: Path) -> list[ShardMember]:
    """List the regular files of an uncompressed tar in their stored order, those of joined tars one after the other.

    Raises:
        ValueError: as `index_parts`.
    """
    return [member for part in index_parts(shard) for member in part]


def index_parts(shard: Path) -> list[list[ShardMember]]:
    """List the regular files of an uncompressed tar in their stored order, for each of the tars that it is joined of.

    `tarfile` accepts a tar that ends after a complete member or has a damaged next header, and stops at the first end.
    This function also checks the block of zeros that ends every tar, and that only zeros or another tar follow it.

    Raises:
        ValueError: the shard is missing, no regular file, compressed, not a tar, cut short, or data follow its end.
    """
    parts: list[list[ShardMember]] = []
    start: int | None = 0
    try:
        url = remote_url(shard)
        with open_regular(shard) if url is None else open_remote(url) as file:
            while start is not None:
                file.seek(start)
                members, end = _members(shard, file)
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise ValueError(f"{shard}: tar is cut short or damaged after byte {end}; fetch it again")
                parts.append(members)
                start = _next_block(file, end)
                if start is not None and not _is_header(file, start):
                    raise ValueError(f"{shard}: data follow the end of the tar at byte {end}; pack it anew")
            return parts
    except FileNotFoundError:
        raise ValueError(f"{shard}: no such tar shard{path_hint(shard) or '; check the path'}") from None
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read: {error.strerror or error}") from None


def _next_block(file: IO[bytes], start: int) -> int | None:
    """Return the first block from byte `start` on that has anything but zeros; None if there is none."""
    file.seek(start)
    position = start
    for chunk in iter(lambda: file.read(_CHUNK), b""):
        rest = chunk.lstrip(b"\0")
        if rest:
            found = position + len(chunk) - len(rest)
            return start + (found - start) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(chunk)
    return None


def _is_header(file: IO[bytes], position: int) -> bool:
    """Return whether the block at `position` is the header of a tar's member, by its checksum."""
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _members(shard: Path, file: IO[bytes]) -> tuple[list[ShardMember], int]:
    """Return the regular files of an open tar and the position of its end."""
    members = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.issparse():
                    raise tarfile.TarError(f"{member.name} is a sparse member")
                if (member.islnk() or member.issym()) and Path(member.name).suffix.lower() in _SUFFIXES:
                    raise tarfile.TarError(f"{member.name} is a link; pack it with --dereference --hard-dereference")
                if member.isreg():
                    members.append(ShardMember(str(shard), member.name, member.offset_data, member.size))
            return members, tar.offset
    except OSError:
        raise
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: not a complete uncompressed tar ({error}); fetch it again or unzip it") from None
    except Exception:  # a forged header can raise any error: OverflowError, MemoryError, RecursionError, ValueError
        raise ValueError(f"{shard}: a header of the tar is damaged; fetch it again") from None


def read_span(shard: str, offset: int, size: int) -> bytes:
    """Read at most `size` bytes from byte `offset` on of a file or URL. Raises OSError."""
    url = remote_url(shard)
    if url is not None:
        return read_range(url, offset, size)
    with open_regular(Path(shard)) as file:
        file.seek(offset)
        return file.read(size)


def read_member(member: ShardMember) -> bytes:
    """Read the bytes of a member. Raises OSError if it is too large, or the shard is missing or shorter than before."""
    if member.size > MAX_MEMBER_BYTES:
        raise OSError(f"{member}: {member.size} bytes are over the limit of {MAX_MEMBER_BYTES}")
    data = read_span(member.shard, member.offset, member.size) if member.content is None else member.content
    if len(data) != member.size:
        raise OSError(f"{member}: {len(data)} of {member.size} bytes are left; the shard changed after indexing")
    return data
