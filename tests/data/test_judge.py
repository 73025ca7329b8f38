"""Evaluation files are judged before the first step, as the evaluation will judge them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mamo.commands.data import main as data_command
from mamo.data.images import decode_image
from mamo.data.judge import grounding_problems, size_of
from mamo.data.pairs_reader import write_json_lines
from mamo.data.records import GroundingRecord, whole_pixels
from mamo.evaluation.metrics.grounding import best_proposal
from mamo.evaluator import evaluate
from mamo.trainer import train
from tests.tiny import TWO_STEPS, config_of

pytestmark = pytest.mark.usefixtures("no_curves")
BOX = [2.0, 2.0, 6.0, 6.0]
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vqa": lambda k: {"image": f"{k}.png", "question_id": k, "question": "what?",
                      "answers": ["yes", "no"][: 1 + k % 2]},
    "entailment": lambda k: {"image": f"{k}.png", "sentence": f"s {k}", "label": "neutral", "pair_id": str(k)},
    "reasoning": lambda k: {"images": [f"{k}.png", f"{k + 1}.png"], "sentence": f"s {k}", "label": k % 2 == 0,
                            "identifier": f"dev-{k}-0-0"},
    "grounding": lambda k: {"image": f"{k}.png", "expression_id": k, "expression": f"red circle {k}", "box_xywh": BOX,
                            "proposals_xywh": [BOX, [4.0, 4.0, 9.0, 9.0]]},
    "pairs": lambda k: {"image": f"{k}.png", "caption": f"red circle {k}", "image_id": k},
}  # fmt: skip
SOME = {"vqa": "vqa/accuracy", "reasoning": "reasoning/accuracy", "grounding": "grounding/proposal",
        "pairs": "itc/i2t_r1", "entailment": "entailment/accuracy"}  # fmt: skip


def write(folder: Path, name: str, kind: str, numbers: range, **over: Any) -> Path:
    """Records of pictures of 16 x 16 px; `over` is put into the last one, and a None removes a field."""
    folder.mkdir(exist_ok=True)
    for k in (*numbers, numbers.stop):
        Image.fromarray(np.full((16, 16, 3), 7 * k % 256, np.uint8)).save(folder / f"{k}.png")
    rows = [ROWS[kind](k) for k in numbers]
    rows[-1] = {key: value for key, value in (rows[-1] | over).items() if value is not None}
    write_json_lines(folder / name, rows)
    return folder / name


def run_of(kind: str, folder: Path, eval_file: Path, **data: Any) -> Any:
    """The config of a run of two steps."""
    train_file = write(folder, "train.jsonl", kind, range(40, 56))
    source = "pairs" if kind == "pairs" else "records"
    files = {"source": source, "train_file": str(train_file), "eval_file": str(eval_file), **data}
    task = "pretrain" if kind == "pairs" else kind
    evaluation = {"enabled": True, "batch_size": 4, "rerank_k": 3}
    return config_of(task, data=files, training=TWO_STEPS, output_dir=str(folder / "run"), evaluation=evaluation)


REFUSED = [
    ("reasoning", {"identifier": "t-1"}, "identifier 't-1' is neither"),
    ("reasoning", {"identifier": "t_1"}, "identifier 't_1' is neither"),
    ("reasoning", {"identifier": "1-2-3-4-5"}, "is neither"),
    ("reasoning", {"images": ["0.png"]}, r"has 1 image\(s\), others 2"),
    ("grounding", {"box_xywh": None}, r"expression_id 7 \(.*7\.png\): has no box_xywh"),
    ("grounding", {"box_xywh": [10.0, 2.0, 9.0, 4.0]}, r"box \(10\.0, .* is not inside its image of 16 x 16 px"),
    ("grounding", {"proposals_xywh": [[2.2, 3.2, 0.5, 0.5]]}, "proposal 0 .* covers no pixel of 16 x 16"),
    ("grounding", {"proposals_xywh": [BOX, [0.0, 0.0, 30.0, 30.0]]}, "is not inside its image"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "over", "message"), REFUSED)
def test_what_an_evaluation_refuses_is_refused_before_the_first_step(
    kind: str, over: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: all steps run, then the evaluation ends with an error and there are no results; `validate` says valid."""
    file = write(tmp_path, "eval.jsonl", kind, range(8), **over)
    with pytest.raises(ValueError, match=message):
        train(run_of(kind, tmp_path, file), is_resume=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    for command in ("validate", "check"):
        data_command([command, "--task", kind, str(file)])
        assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize("kind", list(ROWS))
@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_picture_that_cannot_be_opened_is_said_before_the_first_step(
    kind: str, content: bytes | None, tmp_path: Path
) -> None:
    """Bug: an unreadable evaluation image ends the run after its last step."""
    file = write(tmp_path, "eval.jsonl", kind, range(8))
    (tmp_path / "5.png").unlink() if content is None else (tmp_path / "5.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"5\.png: "):
        train(run_of(kind, tmp_path, file), is_resume=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("kind", list(ROWS))
def test_every_evaluation_skips_as_bad_samples_says(kind: str, tmp_path: Path) -> None:
    """Bug: `data.bad_samples.policy: skip` is obeyed by pairs only, or what was skipped is counted as right."""
    file = write(tmp_path, "eval.jsonl", kind, range(8))
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:45])  # the header is whole
    train(run_of(kind, tmp_path, file, bad_samples={"policy": "skip", "budget": 0.5}), is_resume=False)
    (entry,) = json.loads((tmp_path / "run/results.json").read_text())["evaluations"]
    assert entry["facts"]["skipped"] == 1
    assert entry["protocol"].endswith("-custom")
    assert 0 <= entry["metrics"][SOME[kind]] <= 100
    protocol = "pairs-zeroshot" if kind == "pairs" else f"records-{kind}"
    again = evaluate(tmp_path / "run", protocol, [f"data.eval_file={file}"], tmp_path / "again", pictures=2)
    assert (again["protocol"], again["metrics"]) == (entry["protocol"], entry["metrics"])
    with pytest.raises(ValueError, match=r"0\.png: "):
        evaluate(
            tmp_path / "run", protocol, [f"data.eval_file={file}", "data.bad_samples.policy=raise"], tmp_path / "c"
        )
    for k in range(9):
        (tmp_path / f"{k}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="budget"):
        evaluate(tmp_path / "run", protocol, [f"data.eval_file={file}"], tmp_path / "d")


def test_a_subset_of_other_statements_is_said_before_the_first_step(tmp_path: Path) -> None:
    """Bug: NLVR2's subsets are compared with the split after training."""
    file = write(tmp_path, "dev.jsonl", "reasoning", range(8))
    write(tmp_path, "balanced-dev.jsonl", "reasoning", range(3, 12))
    with pytest.raises(
        ValueError, match=r"balanced-dev\.jsonl: 4 statements are not of .*dev\.jsonl, the first dev-10"
    ):
        train(run_of("reasoning", tmp_path, file), is_resume=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_statements_about_another_number_of_images_are_refused(tmp_path: Path) -> None:
    """Bug: a network trained on pairs is evaluated on single images without a word."""
    rows = [ROWS["reasoning"](k) | {"images": [f"{k}.png"]} for k in range(8)]
    write(tmp_path, "unused.jsonl", "reasoning", range(8))
    write_json_lines(tmp_path / "eval.jsonl", rows)
    with pytest.raises(ValueError, match=r"are about 1 image\(s\), those of data\.train_file about 2"):
        train(run_of("reasoning", tmp_path, tmp_path / "eval.jsonl"), is_resume=False)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_header_is_that_of_the_decoded_picture(orientation: int, tmp_path: Path) -> None:
    """Bug: boxes of a turned photograph are judged in its stored width and height."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    height, width = decode_image(tmp_path / "a.jpg").shape[1:]
    assert size_of(str(tmp_path / "a.jpg")) == (width, height)


NUMBERS = st.one_of(st.integers(-3, 20).map(float), st.floats(-3, 20, allow_nan=False))
SIDES = st.one_of(st.integers(1, 20).map(float), st.floats(0.01, 20, allow_nan=False))


@given(st.tuples(NUMBERS, NUMBERS, SIDES, SIDES), st.integers(1, 18), st.integers(1, 18))
def test_boxes_that_pass_the_judge_can_be_scored(
    box: tuple[float, float, float, float], width: int, height: int
) -> None:
    """Bug: the judge before training and the code after it disagree about a box."""
    values = {"image": "a", "expression_id": 1, "expression": "x", "box_xywh": (0.0, 0.0, 1.0, 1.0)}
    record = GroundingRecord.model_validate({**values, "proposals_xywh": [box]})
    if not grounding_problems(record, width, height):
        assert best_proposal(np.ones((height, width)), [box]) == 0
    if whole_pixels(box, width, height) is None:
        with pytest.raises(ValueError, match="covers no pixel"):
            best_proposal(np.ones((height, width)), [box])
