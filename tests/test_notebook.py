"""The notebook, cell by cell, as Jupyter runs it."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "scripts/examples/pictures_to_heat_map.ipynb"


def test_the_notebook_runs_from_pictures_to_a_heat_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_curves: None
) -> None:
    """Bug: a cell names a function, key or file that is gone, or needs what no cell before it made."""
    document = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "2")
    shown: list[Any] = []
    display = ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    package = ModuleType("IPython")
    package.get_ipython, package.version_info = lambda: None, (9, 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("mamo.trainer.write_run_report", lambda *_: None)
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)  # committed without what a machine printed
        exec(compile(ast.parse("".join(cell["source"])), str(NOTEBOOK), "exec"), names)
    assert shown[0].size == (48, 48)
    said = capsys.readouterr().out
    assert "data/train/pairs.csv: valid" in said
    assert "rerank/i2t_r1" in said
    assert "itm_logit" in said
    with Image.open(tmp_path / "runs/notebook/heat.png") as heat:
        assert heat.size == (600, 300)
