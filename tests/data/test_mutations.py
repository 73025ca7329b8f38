"""Any truncation or mutation of records and shards is read, or is one clear error that names the file."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mamo.commands.data import BUILDERS
from mamo.data.images import BadSampleError, decode_image
from mamo.data.pairs_reader import read_pairs
from mamo.data.records import GroundingRecord, ReasoningRecord, VqaRecord, read_task_records
from mamo.data.shards import index_folder, read_shards

FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
PAIR = {"image": "a.jpg", "caption": ["a kite", "red"], "image_id": 1, "directory": "d"}
KARPATHY = {"images": [{"filepath": "v", "filename": "a", "cocoid": 1, "split": "val", "sentences": [{"raw": "x"}]}]}
COCO = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": "x"}]}
VQA = {"image": "a", "question_id": 1, "question": "q?", "answers": ["x"], "answer_type": "other"}
REASONING = {"images": ["a", "b"], "sentence": "s", "label": True, "identifier": "dev-1-0-0"}
GROUNDING = {"image": "a", "expression_id": 1, "expression": "e", "box_xywh": [1, 2, 3, 4], "proposals_xywh": [[1] * 4]}
READERS: dict[str, tuple[object, Callable[[Path], object]]] = {
    "pairs": (PAIR, read_pairs),
    "albef": ([PAIR, PAIR], read_pairs),
    "karpathy": (KARPATHY, lambda file: read_pairs(file, "val")),
    "coco": (COCO, read_pairs),
    "vqa": (VQA, lambda file: read_task_records(file, VqaRecord)),
    "reasoning": (REASONING, lambda file: read_task_records(file, ReasoningRecord)),
    "grounding": (GROUNDING, lambda file: read_task_records(file, GroundingRecord)),
}


def read_or_named(read: Callable[[], object], *names: str) -> None:
    """Read; an error must be a ValueError of one short line with one of the names."""
    try:
        read()
    except ValueError as error:
        text = str(error)
        assert any(name in text for name in names), text
        assert "\n" not in text, text
        assert len(text) < 3000, text
        assert type(error) is ValueError, repr(error)  # noqa: PT017


@st.composite
def mutated(draw: st.DrawFn, value: object) -> object:
    """The value with one part of it replaced or removed."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 4)) == 0:
            del copy[key]  # type: ignore[arg-type]
        else:
            copy[key] = draw(mutated(value[key]))  # type: ignore[index, call-overload]
        return copy
    return draw(JSON)


@pytest.mark.parametrize("name", READERS)
@FEW
@given(data=st.data())
def test_records_with_a_value_of_another_kind(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Bug: a value that nobody thought of ends in a traceback, or in a message without the file."""
    good, read = READERS[name]
    file = tmp_path / "rows.jsonl"
    document = data.draw(mutated(good))
    file.write_text(json.dumps(document) + "\n")
    read_or_named(lambda: read(file), str(file))


@pytest.mark.parametrize("name", READERS)
@FEW
@given(data=st.data())
def test_records_with_other_bytes(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Bug: a file that was cut short or damaged ends in a traceback, or in a message without the file."""
    good, read = READERS[name]
    content = bytearray(json.dumps(good).encode() + b"\n" + json.dumps(good).encode() + b"\n")
    for _ in range(data.draw(st.integers(0, 3))):
        start, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 6))
        content[start : start + length] = data.draw(st.binary(max_size=6))
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_named(lambda: read(file), str(file))


def tar_of() -> bytes:
    picture, tar_bytes = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (3, 3), "red").save(picture, "PNG")
    members = {
        "0.png": picture.getvalue(),
        "0.txt": b"red",
        "a/1.png": picture.getvalue(),
        "a/1.json": b'{"caption": "x"}',
    }
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"comment": "é"}
            tar.addfile(info, io.BytesIO(content))
    return tar_bytes.getvalue()


TAR = tar_of()
HEADERS = [block for block in range(0, len(TAR), 512) if TAR[block + 257 : block + 262] == b"ustar"]


def with_checksum(content: bytearray, start: int) -> None:
    """Make the header at `start` valid again, so that its other fields are believed."""
    header = content[start : start + 512]
    if len(header) == 512:
        total = sum(header[:148]) + 8 * 32 + sum(header[156:])
        content[start + 148 : start + 156] = b"%06o\0 " % total


@FEW
@given(data=st.data())
def test_shards_with_other_bytes(tmp_path: Path, data: st.DataObject) -> None:
    """Bug: a shard that was cut short, damaged or forged ends in a traceback, in silence, or without its name."""
    content = bytearray(TAR)
    for _ in range(data.draw(st.integers(0, 2))):
        start = data.draw(st.sampled_from(HEADERS))
        at = start + data.draw(st.integers(0, 511))
        content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        if data.draw(st.booleans()):
            with_checksum(content, start)
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    folder = tmp_path / "shards"
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    for read in (lambda: list(read_shards(folder / "0.tar")), lambda: list(index_folder(folder))):
        read_or_named(read, str(folder / "0.tar"))


@FEW
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]))
def test_images_with_other_bytes(data: st.DataObject, kind: str) -> None:
    """Bug: a damaged picture raises an error of the decoder, or has another shape than [3, H, W]."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    Image.new("RGB", (9, 7), "red").save(
        out, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {})
    )
    content = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content[: data.draw(st.integers(1, len(content)))]), 10_000, "a.jpg")
    except BadSampleError as error:
        assert str(error).startswith("a.jpg: ")  # noqa: PT017
    else:
        assert image.ndim == 3
        assert image.shape[0] == 3


RELEASES = {
    "coco": ("dataset_coco.json", KARPATHY),
    "vg": ("region_descriptions.json", [{"id": 1, "regions": [{"phrase": "x"}]}]),
    "vgqa": ("question_answers.json", [{"qas": [{"image_id": 1, "qa_id": 1, "question": "q?", "answer": "a"}]}]),
    "vqa2": (
        "v2_OpenEnded_mscoco_test2015_questions.json",
        {"questions": [{"image_id": 1, "question_id": 1, "question": "q?"}]},
    ),
    "nlvr2": ("dev.json", {"identifier": "dev-1-0-0", "sentence": "s", "label": "True", "directory": 3}),
    "snli_ve": (
        "snli_ve_dev.jsonl",
        {"Flickr30K_ID": "1", "gold_label": "neutral", "pairID": "a", "sentence1": "x", "sentence2": "s"},
    ),
    "sbu": ("sbu-captions-all.json", {"image_urls": ["http://x"], "captions": ["x"]}),
}


@pytest.mark.parametrize("name", RELEASES)
@FEW
@given(data=st.data())
def test_releases_with_a_value_of_another_kind(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Bug: a release of another shape ends in a traceback, or writes rows that its reader refuses."""
    file, good = RELEASES[name]
    (tmp_path / file).write_text(json.dumps(data.draw(mutated(good))))
    read_or_named(lambda: BUILDERS[name](tmp_path, tmp_path / "out", True), file)
