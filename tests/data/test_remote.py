"""Shards on another machine, against the same files here: by range reads over the offset index."""

import io
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamo.data import remote
from mamo.data.images import BadSampleError
from mamo.data.pairs import PairDataset
from mamo.data.pairs_reader import read_pairs
from mamo.data.remote import remote_url
from mamo.data.shards import TarShardDataset, index_folder


class Server(ThreadingHTTPServer):
    """Serve a folder, with ranges unless `is_whole`; `sent` has (path, bytes) of each answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent, self.is_whole, self.n_failures = folder, list[tuple[str, int]](), False, 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, has_body: bool) -> None:
        file = self.server.folder / self.path.lstrip("/")
        if self.server.n_failures and has_body:
            self.server.n_failures -= 1
            self.send_error(503)
            return
        if not file.is_file():
            self.send_error(404)
            return
        content, wanted = file.read_bytes(), self.headers.get("Range")
        self.send_response(206 if wanted and not self.server.is_whole else 200)
        if not self.server.is_whole:
            self.send_header("Accept-Ranges", "bytes")
        if wanted and not self.server.is_whole:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.server.sent.append((self.path, len(content)))
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Two indexed shards of three pairs, and `none`, which has no index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("shards", "none"):
        (tmp_path / folder).mkdir()
        for shard in range(2):
            with tarfile.open(tmp_path / folder / f"{shard}.tar", "w") as tar:
                for k in range(3):
                    stream = io.BytesIO()
                    pixels = np.random.default_rng(3 * shard + k).integers(0, 256, (200, 200, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(stream, "PNG")
                    for suffix, data in (("png", stream.getvalue()), ("txt", f"number {shard} {k}".encode())):
                        info = tarfile.TarInfo(f"{k}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    index_folder(tmp_path / "shards")
    found = Server(tmp_path)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def shown(pairs: object) -> list[tuple[bytes, str]]:
    assert isinstance(pairs, TarShardDataset)
    data = PairDataset(pairs, (8, 8))
    samples = [data.load(k, np.random.default_rng(k)) for k in range(len(data))]
    return [(sample.image.numpy().tobytes(), sample.caption) for sample in samples]


def test_shards_there_are_those_here(server: Server) -> None:
    """Bug: a URL loses its slashes as a path; an offset is off by a range's inclusive end; a worker reads its own
    copy; a sample fetches its whole shard, or the index with every start.
    """
    local = read_pairs(server.folder / "shards")
    there = read_pairs(Path(f"{server.url}/shards"))
    assert isinstance(there, TarShardDataset)
    assert isinstance(there.rows, np.memmap)
    server.sent.clear()
    assert shown(there) == shown(local)
    largest = max(int(row["image_size"]) for row in there.rows) + 3 * 1024
    assert len(server.sent) == len(local) == 6
    assert all(n <= largest for _, n in server.sent)
    again = pickle.loads(pickle.dumps(there))
    assert shown(again) == shown(local)
    assert isinstance(local, TarShardDataset)
    assert there.fingerprint() == local.fingerprint()
    server.sent.clear()
    read_pairs(Path(f"{server.url}/shards/"))
    assert [path for path, _ in server.sent] == ["/shards/index.json"]


def test_a_single_shard_needs_no_index(server: Server) -> None:
    """Bug: a tar on another machine is a local path that is not there."""
    there = read_pairs(Path(f"{server.url}/none/1.tar"))
    assert shown(there) == shown(read_pairs(server.folder / "none/1.tar"))


def test_what_goes_wrong_there_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a passing failure ends the run; a server without ranges sends gigabytes; a lost shard is a traceback."""
    with pytest.raises(ValueError, match=r"/none/index\.json: no such file; run `mamo data index`"):
        read_pairs(Path(f"{server.url}/none"))
    pairs = read_pairs(Path(f"{server.url}/shards"))
    data = PairDataset(pairs, (8, 8))
    server.n_failures = 2
    assert data.load(0, np.random.default_rng(0)).caption == "number 0 0"
    server.n_failures = 3
    with pytest.raises(BadSampleError, match=r"shards/0\.tar: cannot be read") as caught:
        data.load(0, np.random.default_rng(0))
    assert "\n" not in str(caught.value)
    server.n_failures, server.is_whole = 0, True
    with pytest.raises(BadSampleError, match="the server sends whole files, not ranges of bytes"):
        data.load(0, np.random.default_rng(0))
    server.is_whole = False
    (server.folder / "shards/0.tar").unlink()
    with pytest.raises(BadSampleError, match=r"shards/0\.tar: no such file"):
        data.load(0, np.random.default_rng(0))
    assert len(PairDataset(pairs, (8, 8), on_bad="skip").load(0, np.random.default_rng(0)).skipped) == 3
    remote._system_of.cache_clear()


def test_which_paths_are_urls() -> None:
    """Bug: a relative path with a colon is a URL, or a URL is none after `Path` joined its slashes."""
    assert remote_url(Path("s3://bucket/x/0.tar")) == "s3://bucket/x/0.tar"
    assert remote_url("hf://datasets/a/b") == "hf://datasets/a/b"
    for text in ("a/b.tar", "/x/y", "file:///x", "C:x", "a:b/c", "~/x"):
        assert remote_url(text) is None


def test_a_file_system_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a missing package or a mistyped protocol is a traceback of fsspec."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3:// needs s3fs to be read; install it with `pip install mamo\[remote\]`"):
        read_pairs(Path("s3://bucket/0.tar"))
    with pytest.raises(ValueError, match="nosuch:// is no kind of URL that fsspec reads"):
        read_pairs(Path("nosuch://bucket/shards"))
