"""Files that others wrote: what is no regular file, too large, too deep or hostile is refused and not read."""

import io
import json
import os
import stat
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mamo.data.files import brief, parse_json, path_hint, read_json
from mamo.data.images import BadSampleError, decode_image
from mamo.data.judge import size_of
from mamo.data.pairs_reader import read_pairs
from mamo.data.records import VqaRecord, read_task_records
from mamo.data.shards import INDEX, TABLE, index_folder, read_shards

DEEP = "[" * 100_000
LONG = "1" * 5000


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Path]:
    """A FIFO that nobody writes; a test that opens it for reading is let go after two seconds, and fails."""
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    timer = threading.Timer(2, lambda: os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK)))
    timer.start()
    yield path
    timer.cancel()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def png(side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return buffer.getvalue()


# ---- what is no regular file ----------------------------------------------------------------------------------------


def test_a_fifo_is_refused_as_every_kind_of_file(fifo: Path, tmp_path: Path) -> None:
    """Bug: a FIFO in place of a file or an image blocks for ever."""
    shard = tmp_path / "0.tar"
    shard.symlink_to(fifo)
    for read in (
        lambda: read_pairs(fifo),
        lambda: read_task_records(fifo, VqaRecord),
        lambda: read_json(fifo),
        lambda: read_shards(shard),
        lambda: decode_image(fifo),
        lambda: size_of(str(fifo)),
    ):
        with pytest.raises(ValueError, match=r"not a regular file but a pipe"):
            read()


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/null", "/dev/full"])
def test_a_device_is_refused(device: str) -> None:
    """Bug: an image without an end fills the memory."""
    for read in (lambda: decode_image(Path(device)), lambda: read_pairs(Path(device))):
        with pytest.raises(ValueError, match=f"{device}.*not a regular file"):
            read()


def test_an_image_file_without_bounds_is_refused(tmp_path: Path) -> None:
    """Bug: a sparse file of a terabyte is read whole."""
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadSampleError, match=r"a\.jpg: .*1099511627776 bytes are over the limit"):
        decode_image(tmp_path / "a.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(BadSampleError, match="Is a directory"):
        decode_image(tmp_path / "folder.jpg")


def test_one_place_opens_images() -> None:
    """Bug: a second place opens pictures of any format, or reads a file that is no regular one."""
    found = [
        file.name
        for file in (Path(__file__).parents[2] / "mamo").rglob("*.py")
        for line in file.read_text().splitlines()
        if "Image.open(" in line
    ]
    assert found == ["images.py"]


# ---- images ---------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
DOS_EPS = struct.pack("<4sIIIIII", b"\xc5\xd0\xd3\xc6", 30, len(EPS), 0, 0, 0, 0) + b"\xff\xff" + EPS


def iptc() -> bytes:
    """An IPTC file whose picture Pillow opens as any format, here EPS."""
    fields = [(3, 60, b"\x01\x00"), (3, 65, b"\x01"), (3, 20, b"\x00\x14"), (3, 30, b"\x00\x14"), (3, 120, b"\x05")]
    fields += [(8, 10, EPS)]
    return b"".join(b"\x1c" + bytes([a, b]) + struct.pack(">H", len(value)) + value for a, b, value in fields)


@pytest.mark.parametrize("content", [EPS, DOS_EPS, iptc()], ids=["eps", "dos-eps", "iptc"])
def test_no_picture_starts_a_program(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a downloaded "jpg" that is PostScript is given to Ghostscript, from files, shards and the API alike."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadSampleError, match=r"a\.jpg: not an image of a format that is read"):
        decode_image(tmp_path / "a.jpg")
    with pytest.raises(BadSampleError, match=r"a\.jpg: not an image of a format that is read"):
        size_of(str(tmp_path / "a.jpg"))
    try:
        opened = Image.open(tmp_path / "a.jpg")  # by the caller, lazily
    except OSError:
        opened = None
    if opened is not None:
        with pytest.raises(BadSampleError, match="not a format that is read"):
            decode_image(opened)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_usual_formats_are_read(kind: str) -> None:
    """Bug: the list of formats leaves one out that photographs come in, or refuses an image that its caller opened."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(buffer, kind, **({"save_all": True} if kind == "MPO" else {}))
    assert decode_image(buffer.getvalue()).shape == (3, 8, 16)
    assert decode_image(Image.open(buffer)).shape == (3, 8, 16)


def with_exif(tags: list[bytes], order: bytes = b"II*\0\x08\0\0\0") -> bytes:
    """A JPEG of 8 x 4 pixels with these entries in its EXIF data."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(4, 8, 3)).save(buffer, "JPEG", quality=95)
    plain = buffer.getvalue()
    exif = b"Exif\0\0" + order + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


TURNED = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
ODD_TAGS = {
    "resolution-text": b"\x1a\x01\x02\0\x04\0\0\0abc\0",
    "resolution-zero": b"\x1a\x01\x05\0\x01\0\0\0\0\0\0\0",
    "unknown-type": b"\x1a\x01\x63\0\x01\0\0\0\0\0\0\0",
    "offset-outside": b"\x0f\x01\x02\0\xff\0\0\0\xff\xff\xff\x7f",
    "gps-no-folder": b"\x25\x88\x04\0\x01\0\0\0\xff\xff\xff\x7f",
    "software-bytes": b"\x31\x01\x07\0\x04\0\0\0\xff\xfe\xfd\xfc",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tag", ODD_TAGS.values(), ids=ODD_TAGS)
def test_metadata_do_not_decide_about_pixels(tag: bytes) -> None:
    """Bug: a photo with an odd EXIF entry is unreadable, because all entries are written anew to be thrown away."""
    plain = decode_image(with_exif([]))
    assert plain.shape == (3, 4, 8)
    upright = decode_image(with_exif([TURNED, tag]))
    assert upright.shape == (3, 8, 4)
    assert (upright == plain.flip(1).transpose(1, 2)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", [b"XX*\0\x08\0\0\0", b"II*\0\xff\xff\xff\x7f", b""], ids=["mark", "offset", "cut"])
def test_damaged_metadata_leave_the_pixels(order: bytes) -> None:
    """Bug: EXIF data that cannot be parsed make the picture unreadable."""
    assert decode_image(with_exif([TURNED], order)).shape[0] == 3


@pytest.mark.parametrize("orientation", [*range(10), 255])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientations_are_pillows(orientation: int, kind: str, tmp_path: Path) -> None:
    """Bug: an orientation is another transposition, one outside of the eight changes the picture, or the size that is
    read from the header is another one."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB"))
    assert (decode_image(buffer.getvalue()).permute(1, 2, 0).numpy() == expected).all()
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert size_of(str(tmp_path / "a.jpg")) == expected.shape[1::-1]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def rows_with(value: str) -> str:
    return f'{{"image": "a.jpg", "caption": "x"}}\n{{"image": "a.jpg", "caption": "y", "image_id": {value}}}\n'


@pytest.mark.parametrize(("value", "reason"), [(DEEP, "nested too deeply"), (LONG, "thousands of digits")])
def test_hostile_json_is_one_error_with_file_and_line(tmp_path: Path, value: str, reason: str) -> None:
    """Bug: a nesting bomb is a RecursionError, a long integer a message without file and line."""
    file = tmp_path / "rows.jsonl"
    for text, line in (
        (rows_with(value), 2),
        (value + "\n", 1),
        (f'[\n{{"image": "a"}},\n{value}', 3),
        (f'{{"images":\n {value}', 2),
        (f'{{"image":\n {value}', 1),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"rows\.jsonl:{line}: ") as caught:
            read_pairs(file)
        assert len(str(caught.value)) < 600
    file.write_text(rows_with(value))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: not valid JSON \(.*{reason}"):
        read_pairs(file)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: not valid JSON \(.*{reason}"):
        read_task_records(file, VqaRecord)
    (tmp_path / "release.json").write_text(f'{{"questions":\n\n[{value}')
    with pytest.raises(ValueError, match=rf"release\.json:3: not valid JSON \(.*{reason}"):
        read_json(tmp_path / "release.json")
    shard = write_tar(tmp_path / "0.tar", [("0.png", png()), ("0.json", b'{"caption": ' + value.encode())])
    with pytest.raises(ValueError, match=rf"0\.tar:1: 0: the \.json member: not valid JSON \(.*{reason}"):
        read_shards(shard)


@pytest.mark.parametrize("depth", [10, 400, 900, 990, 2000])
def test_every_depth_is_data_or_one_error(tmp_path: Path, depth: int) -> None:
    """Bug: a value that the parser accepts is too deep for the message about it."""
    file = tmp_path / "rows.jsonl"
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        file.write_text(rows_with(text))
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
            read_pairs(file)
        with pytest.raises(ValueError, match=r"rows\.jsonl:[12]: "):
            read_task_records(file, VqaRecord)


def test_values_are_brief_in_messages() -> None:
    """Bug: an error line of megabytes quotes a value whole."""
    for value in ("x" * 10**6, [1] * 10**6, {"a": ["b"] * 10**6}, ["y" * 10**6], 10**4000, {1, 2}):
        assert len(brief(value)) < 80
        assert "\n" not in brief(value)
    assert (brief([1, 2.5]), brief(None), brief("ä\n")) == ("[1, 2.5]", "null", '"\\u00e4\\n"')
    with pytest.raises(ValueError, match="thousands of digits"):
        parse_json("-" + LONG)


def test_line_of_a_bomb_ignores_brackets_in_strings() -> None:
    """Bug: brackets inside texts count, and the line is that of an innocent caption."""
    text = json.dumps(["[" * 1000, 'quote " and [' * 600]) + ",\n" + DEEP
    with pytest.raises(ValueError, match="nested too deeply") as caught:
        parse_json("[" + text)
    assert caught.value.line == 2  # type: ignore[attr-defined]


# ---- tar shards -----------------------------------------------------------------------------------------------------


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse(file: Path, members: list[tuple[str, int]]) -> Path:
    """A tar whose members have these sizes and hold zeros, without their bytes on the disk."""
    with open(file, "wb") as tar:
        for name, size in members:
            tar.write(header(name, size))
            tar.seek(-(-size // 512) * 512, io.SEEK_CUR)
        tar.truncate(tar.tell() + 10240)
    return file


def test_huge_members_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """Bug: an image of 2 GiB is an OverflowError without a name, a caption of 8 GiB fills the memory."""
    for suffix, size in (("jpg", 2**31), ("jpg", 2**33), ("txt", 2**33), ("json", 2**33)):
        other = {"jpg": "txt", "txt": "jpg", "json": "jpg"}[suffix]
        shard = sparse(tmp_path / "big.tar", [(f"0.{suffix}", size), (f"0.{other}", 4)])
        with pytest.raises(ValueError, match=rf"big\.tar:1: 0: the .* {size} bytes, over the limit"):
            index_folder(tmp_path)
        with pytest.raises(ValueError, match=rf"big\.tar:1: 0: the .* {size} bytes, over the limit"):
            read_shards(shard)


def test_a_large_member_that_is_not_read_is_none_of_our_business(tmp_path: Path) -> None:
    """Bug: a member with another suffix makes the shard unreadable."""
    file = tmp_path / "0.tar"
    with open(file, "wb") as tar:
        tar.write(header("0.npy", 2**32))
        tar.seek(2**32, io.SEEK_CUR)
        for name, content in (("0.png", png()), ("0.txt", b"red")):
            tar.write(header(name, len(content)) + content.ljust(-(-len(content) // 512) * 512, b"\0"))
        tar.truncate(tar.tell() + 10240)
    assert [pair.captions for pair in read_shards(file)] == [("red",)]


@pytest.mark.parametrize(
    "members",
    [
        [("0.png", png()), ("0.txt", b"one"), ("0.txt", b"two")],
        [("0.png", png()), ("0.txt", b"one"), ("1.png", png()), ("1.txt", b"x"), ("0.png", png()), ("0.txt", b"two")],
        [("a/0.png", png()), ("a/0.txt", b"one"), ("a/0.PNG", png())],
    ],
)
def test_a_key_that_occurs_twice_is_an_error(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    """Bug: of two members of one name the last wins, and a pair is lost or joined of two."""
    with pytest.raises(ValueError, match=r"0\.tar:0: .*0\.(png|PNG|txt) occurs twice; keep one"):
        read_shards(write_tar(tmp_path / "0.tar", members))


def test_two_tars_in_one_file_are_read(tmp_path: Path) -> None:
    """Bug: `cat a.tar b.tar > 0.tar` has half of the pairs, and is valid."""
    one = write_tar(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"x")]).read_bytes()
    (tmp_path / "0.tar").write_bytes(one + one)
    assert len(read_shards(tmp_path / "0.tar")) == 2
    (tmp_path / "0.tar").write_bytes(one + b"x" * 1024)
    with pytest.raises(ValueError, match=r"0\.tar: data follow the end of the tar"):
        read_shards(tmp_path / "0.tar")
    (tmp_path / "0.tar").write_bytes(one + bytes(10**6))
    assert len(read_shards(tmp_path / "0.tar")) == 1


def test_odd_members_are_left_out_or_named(tmp_path: Path) -> None:
    """Bug: macOS's `._` files are pairs, a member without a key has no name in the message, a suffix is a riddle."""
    good = [("0.png", png()), ("0.txt", b"red")]
    shard = write_tar(tmp_path / "0.tar", [("._0.png", b"x"), *good, ("a/._1.txt", b"x"), ("._", b"x")])
    assert [pair.captions for pair in read_shards(shard)] == [("red",)]
    for member, message in (
        (".png", r":2: \.png: no caption"),
        ("dir/.txt", r":2: dir/\.txt: no image"),
        ("1.outputs.txt", r":2: 1: no caption: .*; found \.outputs\.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            read_shards(write_tar(tmp_path / "0.tar", [*good, (member, b"x")]))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_linked_member_is_not_left_out_in_silence(tmp_path: Path, kind: bytes) -> None:
    """Bug: a pair whose members are links of tar to another one is dropped."""
    shard = write_tar(tmp_path / "0.tar", [("0.png", png()), ("0.txt", b"x")])
    for name in ("1.txt", "a/1.PNG"):
        write_tar(shard, [("0.png", png()), ("0.txt", b"x")])
        with tarfile.open(shard, "a") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.txt"
            tar.addfile(info)
        with pytest.raises(ValueError, match=rf"0\.tar: .*{name} is a link; pack it with --dereference"):
            read_shards(shard)


@pytest.mark.parametrize("patch", [b"9" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1\0" + bytes(9), b"\0" * 12])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"K"])
def test_forged_headers_name_the_shard(tmp_path: Path, patch: bytes, kind: bytes) -> None:
    """Bug: a forged size or type ends in OverflowError, MemoryError or a message of a library without the file."""
    block = bytearray(write_tar(tmp_path / "0.tar", [("0.png", png()), ("0.txt", b"x")]).read_bytes())
    block[124:136], block[156:157] = patch, kind
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    (tmp_path / "0.tar").write_bytes(block)
    try:
        read_shards(tmp_path / "0.tar")
    except ValueError as error:
        assert str(tmp_path / "0.tar") in str(error)  # noqa: PT017


# ---- the index of a folder ------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"{number}.tar", [("0.png", png()), ("0.txt", b"red"), ("1.png", png()), ("1.txt", b"two")])
    return folder


@pytest.mark.parametrize(
    "document",
    [
        "[]", "3", "null", '"shards"', "{}", '{"shardlist": []}', '{"shards": 3}', '{"shards": null}',
        '{"shards": [3]}', '{"shards": [{}]}', '{"shards": [{"name": 3}]}', DEEP,
        '{"shards": [{"name": "0.tar", "bytes": "x", "mtime_ns": 0, "pairs": 2}]}',
        '{"shards": [{"name": "0.tar", "bytes": 1, "mtime_ns": 0, "pairs": -2}]}',
        '{"shards": [{"name": "0.tar", "bytes": 1, "mtime_ns": 0, "pairs": true}]}',
        '{"shards": [{"name": "../0.tar", "bytes": 1, "mtime_ns": 0, "pairs": 2}]}',
    ],
)  # fmt: skip
def test_an_index_of_another_shape_is_named(shards: Path, document: str) -> None:
    """Bug: TypeError or KeyError for an index.json that another program wrote."""
    index_folder(shards)
    (shards / INDEX).write_text(document)
    with pytest.raises(ValueError, match=r"index\.json: .*`mamo data index`"):
        read_shards(shards)


@pytest.mark.parametrize("document", ['{"__kind__": "wids-shard-index-v1", "shardlist": []}', "[1]", "{}"])
def test_the_index_of_another_program_is_not_overwritten(shards: Path, document: str) -> None:
    """Bug: `mamo data index` replaces an index.json of the user's."""
    (shards / INDEX).write_text(document)
    with pytest.raises(ValueError, match=r"index\.json: not an index of `mamo data index`; move it"):
        index_folder(shards)
    assert (shards / INDEX).read_text() == document
    assert len(read_shards(shards / "*.tar")) == 4
    (shards / INDEX).write_text('{"shards": [{"na')  # our own, cut short
    assert len(index_folder(shards)) == 4


def test_a_table_of_another_shape_is_named(shards: Path) -> None:
    """Bug: a table of another type has no pairs in silence; offsets outside of a shard are "Invalid argument"."""
    pairs = index_folder(shards)
    rows = np.array(pairs.rows)
    for table in (np.zeros(4), np.zeros((4, 1), rows.dtype), np.zeros(4, "<i8"), np.zeros(4, "<i8,<i4")):
        np.save(shards / TABLE, table)
        with pytest.raises(ValueError, match=r"index\.npy: not a table of `mamo data index`"):
            read_shards(shards)
    for key, value in (("image_offset", -1), ("image_offset", 2**62), ("text_size", -1), ("text_offset", 10**6)):
        forged = rows.copy()
        forged[3][key] = value
        np.save(shards / TABLE, forged)
        with pytest.raises(ValueError, match=r"index\.npy: a row is outside of 1\.tar"):
            read_shards(shards)
    (shards / TABLE).unlink()
    os.mkfifo(shards / TABLE)
    with pytest.raises(ValueError, match=r"index\.npy: missing or cut short"):
        read_shards(shards)
    (shards / TABLE).unlink()
    (shards / TABLE).write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"index\.npy: missing or cut short"):
        read_shards(shards)


def test_a_copied_folder_keeps_its_index(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: `cp -r` of an indexed folder is refused, as its times are new; or a changed shard passes for a copy."""
    index_folder(shards)
    for shard in shards.glob("*.tar"):
        os.utime(shard)
    with caplog.at_level("INFO"):
        assert [pair.captions for pair in read_shards(shards)] == [("red",), ("two",)] * 2
    assert "0.tar: copied after indexing" in caplog.text
    content = (shards / "0.tar").read_bytes()
    write_tar(shards / "0.tar", [("0.png", png(3)), ("0.txt", b"red"), ("1.png", png()), ("1.txt", b"twenty")])
    assert len((shards / "0.tar").read_bytes()) == len(content)
    with pytest.raises(ValueError, match=r"0\.tar: was modified after indexing"):
        read_shards(shards)


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_brackets_in_a_folder_are_no_pattern(tmp_path: Path, shards: Path) -> None:
    """Bug: `d [v2]` is taken for a pattern, and its shards are not found; hidden tars are shards to the index alone."""
    folder = tmp_path / "d [v2] *?"
    shards.rename(folder)
    (folder / "._0.tar").write_bytes(b"attributes of macOS")
    assert len(read_pairs(folder)) == 4
    assert len(read_pairs(folder / "0.tar")) == 2
    assert len(index_folder(folder)) == 4
    single = write_tar(tmp_path / "a[1].tar", [("0.png", png()), ("0.txt", b"red")])
    assert len(read_pairs(single)) == 1
    (tmp_path / "p[1].jsonl").write_text('{"image": "a", "caption": "b"}\n')
    assert len(read_pairs(tmp_path / "p[1].jsonl")) == 1


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("https://x.org/a.jsonl", "of URLs only tar shards are read; download the file first"),
        ("file:///data/a.jsonl", "write the path without file://"),
        ("data\\a.jsonl", "write the path with / in place of"),
        ("data/{00000..00009}.tar", r"write a glob, such as \[0-9\]"),
        ("~/a.jsonl", "write the whole path"),
        ("$HOME/a.jsonl", "variables are not expanded"),
    ],
)
def test_paths_in_other_notations_are_explained(path: str, hint: str, tmp_path: Path) -> None:
    """Bug: a URL or a pattern of another shell is "No such file or directory", without the reason."""
    readers: list[Callable[[Path], object]] = [read_pairs, decode_image]
    for read in readers:
        with pytest.raises(ValueError, match=hint) as caught:
            read(Path(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=hint):
        decode_image(tmp_path / path)
    assert path_hint("data/plain name-1.jsonl") == ""


def test_globs_are_for_shards(tmp_path: Path) -> None:
    """Bug: `data/*.jsonl` is "not a complete uncompressed tar"."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"image": "a", "caption": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl is no tar shard, and globs are for shards; name each other file"):
        read_pairs(tmp_path / "*.jsonl")
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(ValueError, match=r"0\.tar"):
        read_pairs(tmp_path / "0.tar")
