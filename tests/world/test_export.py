"""The embedded world through the official files and back: export, build, read."""

from pathlib import Path

import numpy as np
from PIL import Image

from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.questions import build_vqa2
from mamo.data.builders.refcoco import build_refcoco
from mamo.data.builders.snli_ve import build_snli_ve
from mamo.data.records import (
    EntailmentRecord,
    GroundingRecord,
    ReasoningRecord,
    VqaRecord,
    image_path,
    read_task_records,
)
from mamo.world.entailment import entailment_items
from mamo.world.export import export_scenes
from mamo.world.questions import question
from mamo.world.referring import expressions
from mamo.world.rendering import render
from mamo.world.scene import SceneWorld
from mamo.world.statements import pair_statements

WORLD = SceneWorld("full", 0)
SIZE = (48, 64)
N = 30


def shows(file: Path, index: int, split: str) -> bool:
    """Whether a picture file is that of scene `index`, up to JPEG's loss."""
    expected = render(WORLD.scene(split, index), SIZE).astype(float)
    return float(np.abs(np.asarray(Image.open(file), float) - expected).mean()) < 6


def test_questions(tmp_path: Path) -> None:
    """Bug: answers of another question, or a picture of another scene, after two files and a join."""
    for split in ("train", "test"):
        export_scenes(WORLD, split, N, SIZE, tmp_path / "release", "vqa2")
    build_vqa2(tmp_path / "release", tmp_path / "out")
    records = read_task_records(tmp_path / "out/train.jsonl", VqaRecord)
    for index, record in enumerate(records):
        asked = question(WORLD, "train", index)
        assert (record.question, tuple(record.answers), record.answer_type) == (
            asked.text, asked.answers, asked.answer_type
        )  # fmt: skip
        assert shows(image_path(tmp_path / "out/train.jsonl", record.image), index, "train")
    test = read_task_records(tmp_path / "out/test.jsonl", VqaRecord)
    assert len(records) == len(test) == N
    assert not any(record.answers for record in test)


def test_statements(tmp_path: Path) -> None:
    """Bug: left and right exchanged on the way, or the pictures of another pair of the same set."""
    for split, ours in (("train", "train"), ("val", "dev")):
        export_scenes(WORLD, split, N, SIZE, tmp_path / "release", "nlvr2")
        build_nlvr2(tmp_path / "release", tmp_path / "out")
        file = tmp_path / f"out/{ours}.jsonl"
        records = read_task_records(file, ReasoningRecord)
        assert len(records) == N
        for record, item in zip(records, pair_statements(WORLD, split, N), strict=True):
            assert (record.sentence, record.label) == (item.sentence, item.label)
            left, right = (image_path(file, name) for name in record.images)
            assert shows(left, item.left, split)
            assert shows(right, item.right, split)


def test_entailment(tmp_path: Path) -> None:
    """Bug: a label of another picture, or a picture without its card, after the official file."""
    for split, ours in (("train", "train"), ("val", "dev"), ("test", "test")):
        export_scenes(WORLD, split, N, SIZE, tmp_path / split, "snli_ve")
        build_snli_ve(tmp_path / split, tmp_path / f"{split}-out")
        file = tmp_path / f"{split}-out/{ours}.jsonl"
        records = read_task_records(file, EntailmentRecord)
        for record, item in zip(records, entailment_items(WORLD, split, N), strict=True):
            assert (record.sentence, record.label, record.pair_id) == (item.sentence, item.label, item.identifier)
            shown = np.asarray(Image.open(image_path(file, record.image)), float)
            whole = render(WORLD.scene(split, item.scene_index), SIZE).astype(float)
            row, column = divmod(item.covered, 3)
            card = np.zeros(SIZE, bool)
            card[16 * row : 16 * row + 16, round(64 * column / 3) : round(64 * (column + 1) / 3)] = True
            assert np.abs(shown[card] - 128).mean() < 6
            assert np.abs(shown - whole)[~card].mean() < 6


def test_expressions(tmp_path: Path) -> None:
    """Bug: boxes joined by image instead of by annotation, or proposals of another picture."""
    export_scenes(WORLD, "test", N, SIZE, tmp_path / "release", "refcoco")
    build_refcoco(tmp_path / "release", tmp_path / "out")
    records = read_task_records(tmp_path / "out/testA.jsonl", GroundingRecord)
    for record, item in zip(records, expressions(WORLD, N, SIZE), strict=True):
        assert (record.expression, record.box_xywh) == (item.text, item.box)
        assert tuple(record.proposals_xywh) == item.proposals
        assert shows(image_path(tmp_path / "out/testA.jsonl", record.image), item.scene_index, "test")
