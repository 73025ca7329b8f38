"""Curves of several runs in one picture, and the table of their last numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mamo.commands.plot import main
from mamo.reports.overlay import draw_runs, last_numbers, read_runs
from tests.tiny import values_of


def write_run(folder: Path, losses: list[float], evaluation: dict[str, float] | None = None, **over: Any) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": k + 1, "loss/itc": loss, "learning_rate": 0.1} for k, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(values_of(output_dir=str(folder), **over)))
    if evaluation:
        entry = {"step": len(losses), "protocol": "x", "metrics": evaluation}
        (folder / "results.json").write_text(json.dumps({"evaluations": [entry]}))
    return folder


def test_the_table_has_what_differs_and_the_last_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: runs exchanged, a key that all share, the first numbers for the last, a run without an evaluation fails."""
    one = write_run(tmp_path / "a/run", [9.0] * 80 + [2.0] * 60, {"rerank/i2t_r1": 88.54}, seed=1)
    two = write_run(tmp_path / "b/run", [5.0] * 30, seed=2, training={"learning_rate": 0.5})
    picture = tmp_path / "x.png"
    main([str(one), str(two), "--to", str(picture)])
    said = capsys.readouterr().out
    table = {
        line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]]
        for line in said.splitlines()
        if line.startswith("|")
    }
    assert table[""] == ["a/run", "b/run"]
    assert table["`seed`"] == ["1", "2"]
    assert table["`training.learning_rate`"][1] == "0.5"
    assert table["steps"] == ["140", "30"]
    assert table["`loss/itc`"] == ["2", "5"]
    assert table["`rerank/i2t_r1`"] == ["88.5", ""]
    assert not any(key.startswith(("`output_dir", "`data.", "`learning_rate")) for key in table)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--to: .*x\.png: exists; choose another file"):
        main([str(one), "--to", str(picture)])
    main([str(one), "--to", str(picture), "--overwrite", "--metric", "learning_rate"])
    assert "`learning_rate` | 0.1 |" in capsys.readouterr().out


def test_each_run_is_a_line_of_each_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run is left out, drawn under another's name, or at other steps."""
    folders = [write_run(tmp_path / name, [value] * 20) for name, value in (("one", 1.0), ("two", 2.0))]
    drawn: list[Any] = []
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_runs(read_runs(folders), ["loss"], tmp_path / "x.svg")
    (axis,) = drawn[0].axes
    assert axis.get_title() == "loss/itc"
    lines = {line.get_label(): (line.get_xdata()[-1], line.get_ydata()[-1]) for line in axis.get_lines()}
    assert lines == {"one": (20.0, 1.0), "two": (20.0, 2.0)}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "two"]
    assert last_numbers(folders[:1], read_runs(folders[:1]), [])[0] == "|  | one |"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Bug: a folder without metrics or a metric without a run is a traceback or an empty picture."""
    run = write_run(tmp_path / "run", [1.0])
    (tmp_path / "none").mkdir()
    for arguments, message in (
        ([str(tmp_path / "none")], r"none: no metrics\.jsonl; name the folder of a run"),
        ([str(run), str(run)], "named twice"),
        ([str(run), "--metric", "loss/itx"], "--metric: no run has 'loss/itx'; there are loss/itc"),
        ([str(run), "--to", str(tmp_path / "x.txt")], r"--to: .*x\.txt: pictures are \.png"),
    ):
        to = [] if "--to" in arguments else ["--to", str(tmp_path / "y.png")]
        with pytest.raises(ValueError, match=message):
            main([*arguments, *to])
