"""The `mamo probe` command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mamo.commands.probe import main


def test_patches_prints_tables_and_writes_numbers(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: numbers of a run's random weights under its name, or a table that the file does not have."""
    to = tmp_path / "probe.json"
    main(["patches", str(pretrained), "--scenes", "20", "--test-scenes", "10", "--to", str(to)])
    shown, document = capsys.readouterr().out, json.loads(to.read_text())
    assert document["checkpoint"].endswith("step-0000002")
    assert document["difficulty"] == "easy"
    rows = {(row["layer"], row["caption"]): row for row in document["rows"]}
    own = rows["encoder 1", "-"]["accuracy"]["own/colour"]
    assert f"| encoder 1 | - | {own:.1f} / {rows['encoder 1', '-']['random']['own/colour']:.1f} |" in shown
    assert rows["pixels", "-"]["random"] == {}
    assert rows["fusion 1", "true"]["accuracy"] != rows["fusion 1", "true"]["random"]
    assert shown.count("| pixels |") == 3


def test_mistakes_of_patches_are_one_line(fails: Callable[[Callable[[], object]], str], tmp_path: Path) -> None:
    """Bug: a traceback for a folder that is no run."""
    assert str(tmp_path) in fails(lambda: main(["patches", str(tmp_path)]))
