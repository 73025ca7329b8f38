"""`mamo data` as a user runs it: output, exit codes, and no traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamo.cli import main
from mamo.data.pairs_reader import read_pairs
from mamo.world import rendering
from mamo.world.captions import all_captions
from mamo.world.scene import SceneWorld

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/data.py"


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


Data = Callable[..., Result]


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str]) -> Data:
    """Runs the command in this process, because importing torch anew takes seconds."""

    def run(*arguments: object) -> Result:
        code = 0
        try:
            main(["data", *map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def refused(result: Result, *parts: str) -> None:
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def test_export_validate_check_tokenizer(data: Data, tmp_path: Path) -> None:
    """Bug: the exported files are not the embedded data set, or cannot be read by our own tools."""
    exported = data("export", "scenes", "--difficulty", "easy", "--split", "val", "--count", 6,
                    "--image-size-px", 96, "--to", tmp_path / "scenes")  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    pairs = tmp_path / "scenes/pairs.jsonl"
    records = read_pairs(pairs)
    world = SceneWorld("easy", 0)
    assert len(records) == 6
    for index, record in enumerate(records):
        scene = world.scene("val", index)
        assert record.captions == tuple(caption.text for caption in all_captions(scene))
        with Image.open(str(record.image)) as image:
            assert (image.format, image.size) == ("JPEG", (96, 96))
            difference = np.abs(np.asarray(image).astype(int) - rendering.render(scene, (96, 96)))
        assert difference.mean() < 3
    validated, checked = data("validate", pairs), data("check", pairs)
    assert (validated.returncode, checked.returncode) == (0, 0)
    assert "captions: 30" in validated.stdout
    assert "images: expected 6, found 6, unreadable 0" in checked.stdout
    made = data("tokenizer", pairs, "--size", 250, "--to", tmp_path / "tokenizer")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()


def test_check_fails_on_a_gap(data: Data, tmp_path: Path) -> None:
    """Bug: a pipeline goes on although images are missing, because the exit code is 0."""
    (tmp_path / "pairs.jsonl").write_text('{"image": "gone.jpg", "caption": "a kite"}\n')
    result = data("check", tmp_path / "pairs.jsonl")
    assert result.returncode == 1
    assert "images: expected 1, found 0, unreadable 1" in result.stdout
    assert "gone.jpg: FileNotFoundError" in result.stdout


@pytest.mark.parametrize("command", ["validate", "check"])
def test_bad_rows_are_one_line_and_exit_code_2(data: Data, tmp_path: Path, command: str) -> None:
    """Bug: a traceback for the user's mistake."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"image": "a.png", "captoin": "x"}) + "\n")
    refused(data(command, file), f"{file}:1:", "'caption' is missing", "did you mean 'caption'?")


def test_other_mistakes_are_one_line(data: Data, tmp_path: Path) -> None:
    """Bug: a missing file, a small size, an empty count or an unwritable target ends in a traceback."""
    (tmp_path / "captions.txt").write_text("a kite\n")
    (tmp_path / "file").write_text("")
    refused(data("validate", tmp_path / "missing.jsonl"), "missing.jsonl")
    refused(
        data("tokenizer", tmp_path / "captions.txt", "--size", 10, "--to", tmp_path / "t"), "--size 10 is too small"
    )
    refused(
        data("export", "scenes", "--count", 0, "--to", tmp_path / "s"), "count and image size must be at least 1, got 0"
    )
    refused(data("export", "scenes", "--count", 1, "--to", tmp_path / "file/below"), "file")
    refused(data("build", "nlvr", "--from", tmp_path, "--to", tmp_path / "n"), "dev.json: no such file")


def test_as_a_real_process(tmp_path: Path) -> None:
    """Bug: an exit code or message that is right only inside the test's own process."""
    command = [sys.executable, str(SCRIPT), "validate", str(tmp_path / "missing.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    announced, _, rest = done.stderr.partition("\n")  # at once, before what takes seconds to import
    assert announced == "data: validate"
    refused(Result(done.returncode, done.stdout, rest), "missing.jsonl")
