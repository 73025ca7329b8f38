"""Random access to the members of uncompressed tar shards, without extraction.

A tar file is a sequence of 512-byte headers, each followed by the bytes of its member. One pass over the headers yields
the offsets of all members. Reading a member then takes one seek and one read. The file is opened for every read, so a
`ShardMember` is plain data that any worker process can use.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path


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

    `tarfile` accepts a tar that ends after a complete member or has a damaged next header. This function also checks
    the block of zeros that ends every tar.

    Raises:
        ValueError: the shard is missing, compressed, not a tar, or cut short.
    """
    members = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    members.append(ShardMember(str(shard), member.name, member.offset_data, member.size))
            end = tar.offset
        with shard.open("rb") as file:
            file.seek(end)
            closing = file.read(tarfile.BLOCKSIZE)
    except FileNotFoundError:
        raise ValueError(f"{shard}: no such tar shard; check the path") from None
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: not a complete uncompressed tar ({error}); fetch it again or unzip it") from None
    if closing != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{shard}: tar is cut short or damaged after byte {end}; fetch it again")
    return members


def read_member(member: ShardMember) -> bytes:
    """Read the bytes of a member. Raises OSError if the shard is missing or shorter than at indexing."""
    with open(member.shard, "rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError(f"{member}: {len(data)} of {member.size} bytes are left; the shard changed after indexing")
    return data
