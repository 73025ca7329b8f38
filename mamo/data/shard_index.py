"""Random access to the members of uncompressed tar shards, without extraction.

A tar file is a sequence of 512-byte headers, each followed by the bytes of its member. One pass over the headers yields
the offsets of all members. Reading a member then takes one seek and one read. The file is opened for every read, so a
`ShardMember` is plain data that any worker process can use.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mamo.data.files import open_regular, path_hint

MAX_MEMBER_BYTES = 2**30
"""Largest member that is read; a larger one is no image."""
_CHUNK = 2**20
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".txt", ".json")
"""Suffixes of members that are read; a link with one of them is not left out in silence."""


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A regular file in a tar: `size` bytes from byte `offset` of the file `shard`."""

    shard: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


def index_shard(shard: Path) -> list[ShardMember]:
    """List the regular files of an uncompressed tar in their stored order.

    `tarfile` accepts a tar that ends after a complete member or has a damaged next header, and stops at the first end.
    This function also checks the block of zeros that ends every tar, and that only zeros follow it.

    Raises:
        ValueError: the shard is missing, no regular file, compressed, not a tar, cut short, or two tars in one file.
    """
    try:
        with open_regular(shard) as file:
            members, end = _members(shard, file)
            file.seek(end)
            closing = file.read(tarfile.BLOCKSIZE)
            is_followed = any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(_CHUNK), b""))
    except FileNotFoundError:
        raise ValueError(f"{shard}: no such tar shard{path_hint(shard) or '; check the path'}") from None
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read: {error.strerror or error}") from None
    if closing != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{shard}: tar is cut short or damaged after byte {end}; fetch it again")
    if is_followed:
        raise ValueError(
            f"{shard}: data follow the end of the tar at byte {end}; unpack joined tars and pack them anew"
        )
    return members


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


def read_member(member: ShardMember) -> bytes:
    """Read the bytes of a member. Raises OSError if it is too large, or the shard is missing or shorter than before."""
    if member.size > MAX_MEMBER_BYTES:
        raise OSError(f"{member}: {member.size} bytes are over the limit of {MAX_MEMBER_BYTES}")
    with open_regular(Path(member.shard)) as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError(f"{member}: {len(data)} of {member.size} bytes are left; the shard changed after indexing")
    return data
