"""What a report of files of pairs shows."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mamo.config.schema import RunConfig
from mamo.tasks.pretrain.samples import select_samples
from mamo.tasks.registry import build_config


def config_of(**data: object) -> RunConfig:
    data = {"image_size_px": 16, "train_file": "unused.jsonl", **data}
    return build_config({"output_dir": "unused", "data": data, "evaluation": {"enabled": "eval_file" in data}})


def test_pairs_are_distinct_and_their_words_in_place(tmp_path: Path) -> None:
    """Bug: an image twice, a caption that is right for two, a file that is no picture, a masked word that is cut."""
    rows = []
    for k, captions in enumerate((
        ["A Dog  in snow by me", "two dogs"], ["a red bus"], ["Two dogs", "a cat"], ["a lamp"], [" ", "so it is"],
        ["🙂"], ["it is as it is"],
    )):  # fmt: skip
        Image.fromarray(np.full((20, 24, 3), 20 * k, np.uint8)).save(tmp_path / f"{k}.png")
        rows.append({"image": f"{k}.png", "image_id": k, "caption": captions})
    rows.insert(1, {"image": "0.png", "image_id": 0, "caption": "it snows"})
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(source="pairs", eval_file=str(tmp_path / "eval.jsonl"))
    found = select_samples(config, 60)
    assert found is not None
    assert found.captions == ["a dog in snow by me", "a red bus", "so it is", "🙂", "it is as it is"]
    assert [picture.shape for picture in found.pictures] == [(16, 16, 3)] * 5
    assert [int(picture[0, 0, 0]) for picture in found.pictures] == [0, 20, 80, 100, 120]
    assert found.expressions == []
    wanted = {0: {"snow"}, 1: {"a", "red", "bus"}, 2: {"so", "it", "is"}, 4: {"it", "is", "as"}}
    assert [item.scene_index for item in found.masked_words] == list(wanted)
    for item in found.masked_words:
        assert item.caption == found.captions[item.scene_index]
        (answer,) = item.answers
        assert item.caption[item.start : item.end] == answer
        assert answer in wanted[item.scene_index]
    few = select_samples(config, 2)
    assert few is not None
    assert few.captions == found.captions[:2]


def test_expressions_of_a_file_keep_their_boxes(tmp_path: Path) -> None:
    """Bug: boxes in pixels of the file over a resized picture, an image twice, one without a box or that is damaged."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    boxes = {"box_xywh": [32, 16, 16, 8], "proposals_xywh": [[0, 0, 64, 32], [32, 16, 16, 8]]}
    rows = [
        {"image": "c.png", "expression_id": 0, "expression": "broken", **boxes},
        {"image": "a.png", "expression_id": 1, "expression": "boxless"},
        {"image": "a.png", "expression_id": 2, "expression": "the  one", **boxes},
        {"image": "a.png", "expression_id": 3, "expression": "another", **boxes},
        {
            "image": "b.png",
            "expression_id": 4,
            "expression": "blue",
            "box_xywh": [0, 0, 8, 8],
            "proposals_xywh": [[0, 0, 8, 8]],
        },
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"image_size_px": 16, "source": "records", "train_file": "x", "eval_file": str(tmp_path / "eval.jsonl")}
    found = select_samples(build_config({"output_dir": "unused", "task": "grounding", "data": data}), 9)
    assert found is not None
    assert found.captions == []
    shown = {
        item.text: (int(found.pictures[item.scene_index][0, 0, 0]), item.box, item.proposals)
        for item in found.expressions
    }
    assert list(shown) == ["the one", "blue"]
    assert shown == {
        "the one": (255, (8, 8, 4, 4), ((0, 0, 16, 16), (8, 8, 4, 4))),
        "blue": (0, (0, 0, 8, 8), ((0, 0, 8, 8),)),
    }


def test_where_there_is_nothing_to_retrieve_nothing_is_shown() -> None:
    """Bug: scenes shown for a run that is evaluated on statements alone, or an error at its end."""
    assert select_samples(config_of(source="pairs", statements_file="statements.jsonl"), 3) is None
