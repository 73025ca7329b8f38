"""Tar shards from parquet, Arrow and CSV: four shapes of images, ten of captions, and what is left out and counted."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mamo.commands.data import main
from mamo.config.objective import MaskingConfig
from mamo.data.builders.columns import ArrowFile
from mamo.data.collate import Batch
from mamo.data.loader import collate_range
from mamo.data.pair_record import PairRecord
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import read_pairs, write_json_lines
from mamo.data.sampler import epoch_order
from mamo.data.shard_index import ShardMember, index_shard, read_member
from mamo.data.shard_writer import tar_header
from mamo.tasks.pretrain.batch import PairCollator
from mamo.world.vocabulary import scenes_tokenizer

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def write(file: Path, columns: dict[str, Any], row_group_size: int = 2, **options: Any) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    parquet.write_table(pa.table(columns), file, row_group_size=row_group_size, **options)
    return file


def built(files: Path, to: Path, *options: str, kind: str = "parquet") -> list[PairRecord]:
    assert main(["build", kind, "--from", str(files), "--to", str(to), *options]) == 0
    return [*read_pairs(to)]


def bytes_of(record: PairRecord) -> bytes:
    assert isinstance(record.image, ShardMember)
    return read_member(record.image)


PICTURES = [picture(k, kind) for k, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP"))]
TEXTS = [f"caption {k}" for k in range(5)]


def shapes(folder: Path) -> dict[str, Any]:
    for k, content in enumerate(PICTURES):
        (folder / f"{k}.bin").write_bytes(content)
    names = [f"{k}.bin" for k in range(5)]
    structs = [{"bytes": content, "path": name} for content, name in zip(PICTURES, names)]
    return {
        "struct": pa.array(structs, IMAGE),
        "binary": pa.array(PICTURES, pa.binary()),
        "large_binary": pa.array(PICTURES, pa.large_binary()),
        "path": pa.array(names),
        "absolute path in a struct": pa.array([{"bytes": None, "path": str(folder / name)} for name in names], IMAGE),
        "list": pa.array([[row, structs[0]] for row in structs], pa.list_(IMAGE)),
        "dictionary": pa.array(names).dictionary_encode(),
        "struct without a path": pa.array([{"bytes": content} for content in PICTURES]),
    }


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_every_shape_of_an_image_column(tmp_path: Path, compression: str) -> None:
    """Bug: bytes are encoded again, taken from another row after a null or a row group, or a shape is refused."""
    for name, column in shapes(tmp_path).items():
        folder = tmp_path / name.replace(" ", "-")
        at = tmp_path if "path" in name or name == "dictionary" else folder
        file = write(at / f"{folder.name}.parquet", {"image": column, "caption": TEXTS}, compression=compression)
        records = built(file, folder / "shards")
        assert [bytes_of(record) for record in records] == PICTURES, name
        assert [record.captions for record in records] == [(text,) for text in TEXTS]
        if name == "binary":
            assert [str(record.image)[-4:] for record in records] == [".png", ".jpg", "webp", ".gif", ".bmp"]


CAPTIONS: dict[str, tuple[Any, tuple[str, ...], list[tuple[str, ...]]]] = {
    "one text": (["a", "b", "c"], (), [("a",), ("b",), ("c",)]),
    "a list": ([["a", "b"], ["c"], ["d", " "]], (), [("a", "b"), ("c",), ("d",)]),
    "a list whose child is `item`": (
        pa.array([["a"], ["b"], ["c"]], pa.list_(pa.field("item", pa.string()))), (), [("a",), ("b",), ("c",)]),
    "structs": ([{"raw": "a", "id": 1}, {"raw": "b", "id": 2}, {"raw": "c", "id": 3}], ("caption.raw",),
                [("a",), ("b",), ("c",)]),
    "a list of structs": ([[{"raw": "a"}, {"raw": "b"}], [{"raw": "c"}], [{"raw": "d"}]], ("caption.raw",),
                          [("a", "b"), ("c",), ("d",)]),
    "conversations": ([[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": text}] for text in "abc"],
                      ("caption[-1].value",), [("a",), ("b",), ("c",)]),
    "texts of user and assistant": ([[{"user": "?", "assistant": text}] for text in "abc"], ("caption[0].assistant",),
                                    [("a",), ("b",), ("c",)]),
    "large strings": (pa.array(["a", "b", "c"], pa.large_string()), (), [("a",), ("b",), ("c",)]),
    "a dictionary": (pa.array(["a", "b", "a"]).dictionary_encode(), (), [("a",), ("b",), ("a",)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_shape_of_captions(tmp_path: Path, name: str) -> None:
    """Bug: a list is one text, the question of a conversation is the caption, or a path into a struct is not found."""
    column, paths, expected = CAPTIONS[name]
    file = write(tmp_path / "a.parquet", {"image": pa.array(PICTURES[:3]), "caption": column})
    options = [part for path in paths for part in ("--caption", path)]
    assert [record.captions for record in built(file, tmp_path / "out", *options)] == expected


def test_several_columns_keep_their_keys(tmp_path: Path) -> None:
    """Bug: of two caption columns one is lost, or weights cannot be given between them."""
    columns = {"jpg": pa.array(PICTURES[:2]), "txt": ["a", "b"], "conversations": [[{"value": "long a"}], []]}
    file = write(tmp_path / "a.parquet", columns)
    keys = ("--caption", "caption=txt", "--caption", "long=conversations[-1].value")
    assert [record.captions for record in built(file, tmp_path / "out", *keys)] == [("a",), ("b",)]
    both = read_pairs(tmp_path / "out", None, {"long": 0.9, "caption": 0.1})
    assert [record.captions for record in both] == [("long a", "a"), ("b",)]
    (first, *_) = built(file, tmp_path / "img2dataset")
    assert first.captions == ("a",)  # its columns are found by their names


def test_what_gives_no_pair_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a null image ends the build, a failed row is a pair, another split is trained on, or nothing is said."""
    rows = {
        "image": pa.array(
            [{"bytes": content} for content in PICTURES[:3]]
            + [None, {"bytes": b"no image"}, {"path": "gone.jpg"}, {"bytes": PICTURES[3]}],
            IMAGE,
        ),
        "caption": ["a", " ", "c", "d", "e", "f", "g"],
        "split": ["train"] * 6 + ["test"],
        "status": ["success", "success", "failed_to_download"] + ["success"] * 4,
    }  # fmt: skip
    file = write(tmp_path / "a.parquet", rows)
    (only,) = built(file, tmp_path / "out", "--where", "split=train")
    assert bytes_of(only) == PICTURES[0]
    said = capsys.readouterr().out
    for line in ("pairs: found 1", "null images: found 1", "failed rows: found 1", "rows without a caption: found 1",
                 "rows left out by --where: found 1", "images that are not there: found 1",
                 "images of an unknown format: found 1"):  # fmt: skip
        assert line in said
    write(tmp_path / "b.parquet", {"image": pa.array([None, None], IMAGE), "caption": ["a", "b"]})
    with pytest.raises(ValueError, match=r"no row gives a pair; null images: 2"):
        main(["build", "parquet", "--from", str(tmp_path / "b.parquet"), "--to", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_rows_of_one_picture_become_one_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: of five rows a picture four are false negatives; a caption is lost or repeated; later rows are not said."""
    ids = [7, 7, 7, 8, 7]
    columns = {
        "image": pa.array([PICTURES[k - 7] for k in ids]),
        "sentences": [{"raw": t} for t in "abbcd"],
        "imgid": ids,
    }
    file = write(tmp_path / "a.parquet", columns)
    records = built(file, tmp_path / "out", "--caption", "sentences.raw", "--image-id", "imgid")
    assert [(record.captions, record.image_id) for record in records] == [
        (("a", "b"), "7"),
        (("c",), "8"),
        (("d",), "7"),
    ]
    assert "pairs with the image id of an earlier one: found 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "picture"], r"a\.parquet: --image: has no column 'picture'; its columns: image, caption, talk, n"),
        (["--caption", "captoin"], r"--caption: has no column 'captoin'; its columns"),
        (["--caption", "talk[-1].valeu"], r"--caption: talk\[-1\]\.valeu ends nowhere: struct<value: string> has no"),
        (["--caption", "caption.raw"], r"--caption: caption\.raw ends nowhere: string has no \"raw\""),
        (["--caption", "talk]"], r"--caption: 'talk\]' is no path into a column"),
        (["--caption", "n"], r"a\.parquet: row 0: --caption: n is no text or list of texts; got 1"),
        (["--where", "split"], r"--where: 'split' is no condition, such as split=train"),
        (["--where", "split=x"], r"--where: has no column 'split'"),
        (["--image-id", "talk"], r"row 0: --image-id: must be a text or an integer, got a list of 1"),
        (["--image", "n"], r"--image: must be bytes, a path, or a struct or list of these; got int64"),
        (["--caption", "x=caption", "--caption", "x=n"], r"--caption: two columns have the key 'x'"),
        (["--split-by", "unc"], r"--split-by: parquet has no such splits"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    """Bug: a mistyped column is a traceback of the library, or writes shards of nothing."""
    columns = {"image": pa.array(PICTURES[:2]), "caption": ["a", "b"], "talk": [[{"value": "x"}]] * 2, "n": [1, 2]}
    file = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message) as caught:
        main(["build", "parquet", "--from", str(file), "--to", str(tmp_path / "out"), *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    """Bug: the library's text of many lines, or half of the pairs without a word."""
    file = write(tmp_path / "a.parquet", {"image": pa.array(PICTURES * 40), "caption": TEXTS * 40}, 50)
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], b"PAR1", content[:4] + b"\xff" * 60_000 + content[60_004:]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.parquet: (not a parquet file|damaged)") as caught:
            main(["build", "parquet", "--from", str(file), "--to", str(tmp_path / "out")])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_img2datasets_sidecars_are_not_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the list of links next to a tar is read as pictures."""
    folder = tmp_path / "data"
    write(folder / "00000.parquet", {"url": ["http://x"], "caption": ["a"]})
    (folder / "00000.tar").touch()
    with pytest.raises(ValueError, match=r"lists the pairs of 00000\.tar, as img2dataset writes it; the tars are read"):
        main(["build", "parquet", "--from", str(folder), "--to", str(tmp_path / "out")])
    write(folder / "more.parquet", {"image": pa.array(PICTURES[:1]), "caption": ["b"]})
    assert len(built(folder, tmp_path / "out")) == 1
    assert "img2dataset next to their tars, not read: found 1" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["save_to_disk", "hub", "metadata.csv"])
def test_data_sets_of_hugging_face(tmp_path: Path, layout: str) -> None:
    """Bug: the layout of one of the library's three ways to write a data set is not found."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    table = pa.table({"pic": pa.array([{"bytes": c, "path": None} for c in PICTURES], IMAGE), "text": TEXTS})
    features = {"pic": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if layout == "save_to_disk":
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (folder / "dataset_info.json").write_text("{}")
    elif layout == "hub":
        parquet.write_table(table, folder / "data/train-00000-of-00001.parquet")
    else:
        for k, content in enumerate(PICTURES):
            (folder / f"{k}.png").write_bytes(content)
        lines = "".join(f"{k}.png,{text}\n" for k, text in enumerate(TEXTS))
        (folder / "metadata.csv").write_text("file_name,text\n" + lines)
    records = built(folder, tmp_path / "out", kind="huggingface")
    assert [bytes_of(record) for record in records] == PICTURES
    assert [record.captions[0] for record in records] == TEXTS


def test_shards_are_as_tarfile_reads_them(tmp_path: Path) -> None:
    """Bug: a checksum, size or padding that only our reader takes; pairs lost where a shard ends; a stale index."""
    contents = [PICTURES[0] + bytes(n) for n in (0, 1, 511, 512, 300_000, 700_000, 2_000_000, 5)]
    file = write(tmp_path / "a.parquet", {"image": pa.array(contents), "caption": [f"é {k}" for k in range(8)]})
    records = built(file, tmp_path / "out", "--shard-mib", "1")
    assert [bytes_of(record) for record in records] == contents
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) == 3  # six pairs, one of 2 MB, one
    read = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            read += [tar.extractfile(info).read() for info in tar if info.name.endswith("png")]  # type: ignore[union-attr]
        assert index_shard(shard)
    assert read == contents
    (tmp_path / "out/index.json").unlink()
    again = [*read_pairs(tmp_path / "out")]
    assert again == records
    assert len(tar_header("a.png", 2**33 - 1)) == 512


def test_large_pictures_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """Bug: a batch of a row group of large pictures fills the memory; rows are lost or repeated between batches."""
    pictures = [PICTURES[0] + bytes([k]) * 3_000_000 for k in range(6)]
    file = write(tmp_path / "a.parquet", {"image": pa.array(pictures), "caption": list("abcdef")}, 6)
    batches = [*ArrowFile(file).batches("image", ["caption"])]
    assert [len(rows) for rows in batches] == [2, 2, 2]
    assert [row.place.split()[-1] for rows in batches for row in rows] == list("012345")
    records = built(file, tmp_path / "out")
    assert [bytes_of(record) for record in records] == pictures


def test_more_small_pairs_than_one_call_writes(tmp_path: Path) -> None:
    """Bug: buffers that wait are dropped or written twice, or an offset is off, once more wait than a call takes."""
    contents = [PICTURES[0] + bytes([k % 256]) * (k % 7) for k in range(1200)]
    file = write(tmp_path / "a.parquet", {"image": pa.array(contents), "caption": ["a"] * 1200}, 1200)
    assert [bytes_of(record) for record in built(file, tmp_path / "out")] == contents
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert len(tar.getnames()) == 2400


def batch_of(pairs: PairDataset, n: int = 10) -> Batch:
    collator = PairCollator(scenes_tokenizer(), 16, MaskingConfig(), (2, 2), 5, 3)
    collator.n_caption_ids = pairs.n_caption_ids
    return collate_range(pairs, collator, epoch_order(3, 0, n).tolist())


def test_one_set_in_every_layout_gives_the_same_batches(tmp_path: Path) -> None:
    """Bug: a layout exchanges captions and pictures, their order, the weights, or the random numbers of a sample."""
    contents = [picture(k, "PNG") for k in range(10)]
    captions = [[f"red {k}", f"a circle, number {k}"] if k % 3 else ["a star"] for k in range(10)]
    single = ["a small red circle", "a blue square"] * 5
    for k, content in enumerate(contents):
        (tmp_path / f"{k}.png").write_bytes(content)

    def all_layouts(texts: list[Any], name: str) -> dict[str, PairDataset]:
        rows = [{"image": f"{k}.png", "caption": text, "image_id": f"x/{k}"} for k, text in enumerate(texts)]
        write_json_lines(tmp_path / f"{name}.jsonl", rows)
        file = write(
            tmp_path / f"{name}.parquet", {"image": pa.array(contents), "caption": texts, "id": list(range(10))}
        )
        built(file, tmp_path / f"{name}-built", "--image-id", "id")
        (tmp_path / f"{name}-tars").mkdir()
        for first, end in ((0, 4), (4, 10)):
            with tarfile.open(tmp_path / f"{name}-tars/{first:05d}.tar", "w") as tar:
                for k in range(first, end):
                    text = texts[k] if isinstance(texts[k], str) else "\n".join(texts[k])
                    details = {"caption": text, "url": f"http://{k}", "status": "success", "key": f"{k:09d}"}
                    is_one = isinstance(texts[k], str)
                    members = {"png": contents[k], "txt": text.encode()}
                    members |= {"json": json.dumps(details).encode()} if is_one else {}
                    for suffix, data in members.items():
                        info = tarfile.TarInfo(f"{k:09d}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        places = {"lines": f"{name}.jsonl", "built": f"{name}-built", "tars": f"{name}-tars"}
        if isinstance(texts[0], str):
            lines = "".join(f'{k}.png,"{text}",x/{k}\n' for k, text in enumerate(texts))
            (tmp_path / f"{name}.csv").write_text("image,caption,image_id\n" + lines)
            places["csv"] = f"{name}.csv"
            assert (
                main(["build", "csv", "--from", str(tmp_path / f"{name}.csv"), "--to", str(tmp_path / "csv-built")])
                == 0
            )
            places["csv built"] = "csv-built"
        return {key: PairDataset(read_pairs(tmp_path / place), (16, 16)) for key, place in places.items()}

    for texts, name in ((captions, "lists"), (single, "single")):
        layouts = all_layouts(texts, name)
        assert len(layouts) == (5 if name == "single" else 3)
        expected = batch_of(layouts.pop("lines")).tensors()
        for key, pairs in layouts.items():
            found = batch_of(pairs).tensors()
            for field, tensor in expected.items():
                if field == "image_id":  # named by the layout; equal where equal
                    same = [ids[:, None] == ids[None] for ids in (tensor, found[field])]
                    assert torch.equal(*same), (name, key)
                else:
                    assert torch.equal(tensor, found[field]), (name, key, field)
