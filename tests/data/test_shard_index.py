"""Random access to tar members against extraction by `tarfile`."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mamo.data.shard_index import index_shard, read_member


def write_tar(file: Path, contents: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(file, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def contents() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    sizes = (0, 1, 511, 512, 513, 5000)
    named = {f"folder/{size}.bin": rng.bytes(size) for size in sizes}
    return {**named, "folder/" + "long" * 60 + ".bin": b"behind a long name", "folder/ü.txt": b"odd name"}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_random_access_equals_extraction(tmp_path: Path, tar_format: int) -> None:
    """Bug: offsets off by a header, by the padding, or by the extra header of a long name."""
    shard = tmp_path / "0.tar"
    write_tar(shard, contents(), tar_format)
    members = index_shard(shard)
    with tarfile.open(shard) as tar:
        expected = {info.name: tar.extractfile(info).read() for info in tar if info.isfile()}  # type: ignore[union-attr]
    assert expected == contents()
    assert [member.name for member in members] == list(expected)
    assert {member.name: read_member(member) for member in reversed(members)} == expected


@pytest.mark.parametrize("keep", ["half a member", "whole members", "half a header", "nothing"])
def test_cut_shard_is_refused_by_name(tmp_path: Path, keep: str) -> None:
    """Bug: a download that broke off loses its last samples in silence."""
    shard = tmp_path / "cut.tar"
    write_tar(shard, contents())
    members = index_shard(shard)
    last = members[5]  # 5,000 bytes
    length = {
        "half a member": last.offset + 2500,
        "whole members": last.offset - 512,
        "half a header": last.offset - 300,
        "nothing": 0,
    }[keep]
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        index_shard(shard)


def test_damaged_header_compressed_and_missing_shards_are_refused(tmp_path: Path) -> None:
    """Bug: everything behind a damaged header is dropped in silence, or a compressed tar is read as raw offsets."""
    good = tmp_path / "good.tar"
    write_tar(good, contents())
    damaged = bytearray(good.read_bytes())
    offset = index_shard(good)[3].offset
    damaged[offset - 512 : offset] = b"x" * 512
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(good.read_bytes()))
    for name in ("damaged.tar", "zipped.tar", "missing.tar"):
        with pytest.raises(ValueError, match=name):
            index_shard(tmp_path / name)


def test_shard_that_shrank_after_indexing(tmp_path: Path) -> None:
    """Bug: fewer bytes than the member has are handed on."""
    shard = tmp_path / "0.tar"
    write_tar(shard, contents())
    member = index_shard(shard)[5]
    shard.write_bytes(shard.read_bytes()[: member.offset + 10])
    with pytest.raises(OSError, match="10 of 5000 bytes"):
        read_member(member)
