"""Random access to the members of uncompressed tar shards, without extracting them.

A tar file is a row of 512-byte headers, each followed by its member's bytes. One pass over the headers gives every
member's offset; from then on a member is one seek and one read. The file is opened anew for every read, so a
`ShardMember` is plain data that any worker process may use.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ShardMember:
    """One regular file inside a tar: `size` bytes that start `offset` bytes into the file `shard`."""

    shard: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


def index_shard(shard: Path) -> list[ShardMember]:
    """Lists the regular files of an uncompressed tar, in the order they are stored.

    Raises ValueError, naming the shard, where it is missing, compressed, not a tar, or cut short. `tarfile` itself
    takes a tar that ends after a whole member, or whose next header is damaged, for a complete one, so we ask for the
    block of zeros that closes every tar.
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
        raise ValueError(f"{shard}: no such tar shard") from None
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: not a complete uncompressed tar ({error}); fetch it again or unzip it") from None
    if closing != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{shard}: tar is cut short or damaged after byte {end}; fetch it again")
    return members


def read_member(member: ShardMember) -> bytes:
    """Returns the member's bytes. Raises OSError where the shard is gone or shorter than when it was indexed."""
    with open(member.shard, "rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError(f"{member}: {len(data)} of {member.size} bytes are left; the shard changed after it was indexed")
    return data
