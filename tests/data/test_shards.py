"""Shards at scale: the index, order, split, resume and damage, against the same pairs as plain files."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamo.config.schema import RunConfig
from mamo.data.images import BadSampleError
from mamo.data.loader import EpochDataset
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import read_pairs
from mamo.data.sampler import StepSampler, epoch_order
from mamo.data.shards import INDEX, ROW, TABLE, TarShardDataset, index_folder, open_index
from mamo.tasks.sources import pair_dataset

SIZES = (7, 1, 12, 0, 3)
"""Pairs of each shard: uneven, one alone, none."""


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 255 - number, 7)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of `SIZES` pairs; pair n shows colour n and says so, in a text or in JSON, in either order of members."""
    folder, number = tmp_path / "shards", 0
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        members: dict[str, bytes] = {"gone.json": b'{"status": "failed_to_download", "caption": "gone"}'}
        for _ in range(size):
            key, caption = f"{'long' * 30 if number == 5 else ''}{number:05d}", f"number {number}"
            if number % 3:
                members |= {f"{key}.txt": caption.encode(), f"{key}.png": png(number)}
            else:
                members |= {f"{key}.png": png(number), f"{key}.json": json.dumps({"caption": caption}).encode()}
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def shown(pairs: TarShardDataset) -> list[tuple[int, str]]:
    """(colour, caption) of every pair, through the data set as training reads it."""
    data = PairDataset(pairs, (4, 4))
    samples = [data.load(i, np.random.default_rng(0)) for i in range(len(data))]
    return [(int(sample.image[0, 0, 0]), sample.caption) for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_indexed_pairs_are_those_of_the_tars(folder: Path, workers: int) -> None:
    """Bug: offsets of another shard after an empty or uneven one; captions shifted; a worker sees others."""
    expected = [(number, f"number {number}") for number in range(sum(SIZES))]
    plain = read_pairs(folder)
    assert isinstance(plain, TarShardDataset)
    assert shown(plain) == expected
    indexed = index_folder(folder, workers)
    assert shown(indexed) == expected
    assert isinstance(indexed.rows, np.memmap)  # shared by all processes of a machine
    for other in (read_pairs(folder), pickle.loads(pickle.dumps(indexed)), pickle.loads(pickle.dumps(plain))):
        assert isinstance(other, TarShardDataset)
        assert shown(other) == expected
    assert len(pickle.dumps(indexed)) < 300  # where the table is, not what is in it
    assert [record.image_id for record in indexed] == [record.image_id for record in plain]
    assert len({record.image_id for record in indexed}) == sum(SIZES)
    assert [indexed[i].line for i in (0, 6, 7, 8)] == [1, 7, 1, 1]
    assert str(indexed[-1].image).endswith("00004.tar/00022.png")
    assert indexed.fingerprint() == plain.fingerprint()


def batches(pairs: TarShardDataset, start: int, stop: int, rank: int = 0, world: int = 1) -> list[list[str]]:
    """Captions of each step's batch of a process; 6 samples a step over all processes."""
    data = EpochDataset(PairDataset(pairs, (4, 4)), seed=3)
    sampler = StepSampler(len(pairs), 6, 3, start, stop, rank, world)
    return [[data[key][1].caption for key in keys] for keys in sampler]


def test_each_epoch_gives_each_pair_once_over_all_processes(folder: Path) -> None:
    """Bug: a process owns whole shards, so that uneven ones lose, repeat or starve; or processes make unequal steps."""
    pairs = index_folder(folder)
    n_steps = sum(SIZES)  # 23 steps of 6 are 6 epochs of 23
    alone = batches(pairs, 0, n_steps)
    assert Counter(caption for batch in alone for caption in batch) == {f"number {i}": 6 for i in range(sum(SIZES))}
    first_epoch = [caption for batch in alone for caption in batch][: sum(SIZES)]
    assert len(set(first_epoch)) == sum(SIZES)
    assert first_epoch != [f"number {i}" for i in range(sum(SIZES))]
    for world in (2, 3):
        shares = [batches(pairs, 0, n_steps, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {n_steps}
        assert [[caption for part in parts for caption in part] for parts in zip(*shares)] == alone


def test_training_reads_no_pair_before_it_is_drawn(
    folder: Path, tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a run begins by reading every caption of millions, and holds them all in memory."""
    (tmp_path / "one.png").write_bytes(png(200))
    (tmp_path / "own.jsonl").write_text('{"image": "one.png", "caption": "number 200", "image_id": "own/1"}\n' * 2)
    files = [str(tmp_path / "own.jsonl"), str(folder), str(tmp_path / "own.jsonl"), str(folder)]
    read: list[int] = []
    real = TarShardDataset.__getitem__
    monkeypatch.setattr(TarShardDataset, "__getitem__", lambda self, index: read.append(index) or real(self, index))
    source = pair_dataset(tiny(data={"source": "pairs", "train_file": files}))
    n = sum(SIZES)
    assert len(source) == 2 * (2 + n)
    assert len(list(source.fingerprint_items())) == 4  # files
    assert source.dataset_names() == ["other", "own"]
    assert read == []
    captions = [source.load(index, np.random.default_rng(0)).caption for index in range(len(source))]
    assert captions == 2 * [*["number 200"] * 2, *(f"number {k}" for k in range(n))]
    assert read == 2 * list(range(n))


def test_resume_in_the_middle_of_a_shard(folder: Path) -> None:
    """Bug: a resumed run begins at the start of a shard or an epoch."""
    pairs = index_folder(folder)
    assert batches(pairs, 5, 12) == batches(pairs, 0, 12)[5:]


def test_changed_folders_are_refused_by_name(folder: Path) -> None:
    """Bug: a shard cut short, replaced, lost or added after indexing is read at stale offsets or left out."""
    index_folder(folder)
    shard = folder / "00002.tar"
    content, times = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:2048])
    with pytest.raises(ValueError, match=r"00002\.tar: 2048 bytes, \d+ at indexing") as caught:
        read_pairs(folder)
    assert str(caught.value).count("00002") == 1
    shard.write_bytes(content[::-1])
    with pytest.raises(ValueError, match=r"00002\.tar: was modified after"):
        read_pairs(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"missing \(00002\.tar\)"):
        read_pairs(folder)
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(read_pairs(folder)) == sum(SIZES)
    write_tar(folder / "00009.tar", {})
    with pytest.raises(ValueError, match=r"not indexed \(00009\.tar\)"):
        read_pairs(folder)


def test_damaged_shards_are_named_in_one_message_and_nothing_is_written(folder: Path) -> None:
    """Bug: a download that broke off stops at the first shard of many, or leaves an index without its pairs."""
    index_folder(folder)
    for name in ("00000.tar", "00002.tar"):
        (folder / name).write_bytes((folder / name).read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"(?s)00000\.tar.*00002\.tar"):
        index_folder(folder)
    (folder / TABLE).write_bytes((folder / TABLE).read_bytes()[:-40])
    for name in ("00000.tar", "00002.tar"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="2 indexed shards are missing"):
        open_index(folder)
    index_folder(folder)
    (folder / TABLE).write_bytes((folder / TABLE).read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"index\.npy.*run `mamo data index` again"):
        open_index(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: cannot be read"):
        read_pairs(folder)


def test_bad_samples_go_by_the_policy(folder: Path) -> None:
    """Bug: an undecodable image or a shard that is lost while training ends the run whatever the policy says."""
    members = {"0.png": b"no image", "0.txt": b"bad", "1.png": png(9), "1.txt": b"good"}
    write_tar(folder / "00000.tar", members)
    pairs = index_folder(folder)
    with pytest.raises(BadSampleError, match=r"00000\.tar/0\.png"):
        PairDataset(pairs, (4, 4)).load(0, np.random.default_rng(0))
    sample = PairDataset(pairs, (4, 4), on_bad="skip").load(0, np.random.default_rng(0))
    assert (sample.caption, sample.sample_id, len(sample.skipped)) == ("good", 1, 1)
    (folder / "00000.tar").unlink()
    sample = PairDataset(pairs, (4, 4), on_bad="skip").load(0, np.random.default_rng(0))
    assert [line for line in sample.skipped if "00000.tar" in line] == list(sample.skipped)
    assert len(sample.skipped) == 2
    with open(folder / "00002.tar", "r+b") as file:
        file.truncate(700)
    with pytest.raises(BadSampleError, match=r"00002\.tar"):
        PairDataset(pairs, (4, 4)).load(3, np.random.default_rng(0))


def test_no_python_object_a_pair(tmp_path: Path) -> None:
    """Bug: a list of records: seven million, with paths and captions, take several GiB in each process."""
    n_pairs = 200_000
    (tmp_path / "0.tar").touch()
    np.lib.format.open_memmap(tmp_path / TABLE, "w+", ROW, (n_pairs,)).flush()
    state = (tmp_path / "0.tar").stat()
    entry = {"name": "0.tar", "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "pairs": n_pairs, "captions": {}}
    (tmp_path / INDEX).write_text(json.dumps({"shards": [entry]}))
    tracemalloc.start()
    pairs = open_index(tmp_path)
    pairs.fingerprint()
    keys = next(iter(StepSampler(len(pairs), 64, 0, 5_000, 5_001, 0, 1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(keys) == 64
    assert peak < 50 * n_pairs, (
        f"{peak / n_pairs:.0f} bytes a pair"
    )  # a permutation of int64 is 8, made with some copies
    assert sorted(epoch_order(0, 1, 50).tolist()) == list(range(50))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "names", [("crawl" * 19 + "/a", "crawl" * 19 + "x/a"), ("d" * 90 + "/" + "k" * 20,), ("é", "è")]
)
def test_each_picture_of_a_shard_has_an_id(tmp_path: Path, names: tuple[str, ...], format: int, encoding: str) -> None:
    """Bug: pictures whose long or non-ASCII names are equal in their headers are one picture, and recalls are 100."""
    file, stems = tmp_path / "a.tar", [f"{name}{'é' * n}" for name in names for n in (0, 1)]
    with tarfile.open(file, "w", format=format, encoding=encoding) as tar:
        for number, stem in enumerate(stems):
            for suffix, data in (("png", png(number)), ("txt", b"a kite")):
                info = tarfile.TarInfo(f"{stem}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pairs = read_pairs(file)
    assert len({record.image_id for record in pairs}) == len(stems)
    if format == tarfile.USTAR_FORMAT and encoding == "utf-8":
        assert [str(record.image) for record in pairs] == [f"{file}/{stem}.png" for stem in stems]


def test_a_caption_twice_in_a_member_is_an_error(tmp_path: Path) -> None:
    """Bug: of two captions of a .json member the last wins, and the shard is valid."""
    write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.json": b'{"caption": "a kite", "caption": "a dog"}'})
    with pytest.raises(ValueError, match=r'a: the \.json member: key "caption" occurs twice in one object; keep one'):
        read_pairs(tmp_path / "a.tar")
