"""Studies: what they ask for, that nothing runs twice, what they report; a script stands in for the training."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mamo.config import load_config
from mamo.study.execute import collect, run_study, shell_lines
from mamo.study.plan import Study, identity, read_study
from mamo.study.report import write_report
from mamo.study.results import append_row, read_rows

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs/studies").glob("*.yaml") if not p.stem.startswith("base"))
METRIC, OTHER = "probe/attribute_swap/itm", "rerank/i2t_r1"
STUDY = {
    "question": "does it help?",
    "base": "tiny.yaml",
    "variants": {"plain": {}, "more": {"losses.weights.mlm": 0.5}},
    "baseline": "plain",
    "metrics": [METRIC, OTHER],
    "comparisons": [{"variant": "more", "against": "plain", "question": "half of MLM"}],
    "explore_seeds": [0, 1, 2],
    "confirm_seeds": [7],
}
FAKE_TRAINING = """
import json, sys, time
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, seed = Path(settings["output_dir"]), int(settings["seed"])
with open(sys.argv[0] + ".calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
folder.mkdir(exist_ok=True)
(folder / "config.yaml").write_text("seed: 1")
(folder / "checkpoints").mkdir(exist_ok=True)
if seed == 2 and "--resume" not in sys.argv:
    sys.exit(1)
lines = [json.dumps({"step": 30, "loss/itc": 1.5, "samples_per_s": 4.0})]
(folder / "metrics.jsonl").write_text("\\n".join(lines))
(folder / "timing.jsonl").write_text("\\n".join(lines))
value = 50 + seed + (10 if "losses.weights.mlm=0.5" in sys.argv else 0) + seed * ("losses.weights.mlm=0.5" in sys.argv)
entry = {"step": 30, "versions": {}, "metrics": {"METRIC": value, "OTHER": 1.0}}
(folder / "results.json").write_text(json.dumps({"evaluations": [entry]}))
""".replace("METRIC", METRIC).replace("OTHER", OTHER)


@pytest.fixture
def study(tmp_path: Path, tiny_file: Callable[..., Path]) -> Callable[..., Study]:
    """`study(key=value, ...)` writes and reads a study over the tiny base."""

    def make(*common: str, **over: Any) -> Study:
        tiny_file(evaluation={"enabled": True})
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **over}, sort_keys=False))
        return read_study(path, common)

    return make


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Stands in for training: notes that it was called, fails for seed 2 the first time, else writes a run's files."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE_TRAINING)
    return path


def calls(script: Path) -> list[list[str]]:
    """The command lines that the stand-in was called with."""
    path = Path(f"{script}.calls")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_in_order(path: Path) -> None:
    """Bug: a study that ships names a key or variant that does not exist, or was not planned before it runs."""
    study = read_study(path)
    assert study.file.comparisons
    assert study.seeds("explore") == [0, 1, 2, 3, 4]
    assert study.seeds("confirm") == [5, 6, 7, 8, 9]
    cells = study.cells("all")
    assert len({cell.identity for cell in cells}) == len(cells), "two variants are the same run"


def test_studies_share_their_common_cell() -> None:
    """Bug: each study runs the full method again for itself."""
    assert {"losses", "mask_ratio", "methods", "mim_head", "mim_target", "joint_or_alternate"} <= {
        p.stem for p in SHIPPED
    }
    full = identity(load_config(ROOT / "configs/studies/base_scenes.yaml", ["seed=3"]))
    for path in SHIPPED:
        assert full in {cell.identity for cell in read_study(path).cells("explore")}, path.stem


def test_identity_is_what_changes_a_result(study: Callable[..., Study]) -> None:
    """Bug: a cell of another seed or setting is taken for finished, or one runs again for its folder's name."""
    base = study().cell("plain", 0)
    assert study("output_dir=elsewhere", "data.workers=3").cell("plain", 0).identity == base.identity
    assert study("training.checkpoint_every_steps=9").cell("plain", 0).identity == base.identity
    assert study("losses.weights.mlm=1").cell("plain", 0).identity == base.identity  # its default, said aloud
    different = [study().cell("plain", 1), study().cell("more", 0), study("evaluation.probe_items=5").cell("plain", 0)]
    different.append(study("data.difficulty=full").cell("plain", 0))
    assert len({cell.identity for cell in [base, *different]}) == 5


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"baseline": "plane"}, r"baseline: no variant 'plane'; there are plain, more"),
        (
            {"comparisons": [{"variant": "x", "against": "plain", "question": "?"}]},
            r"comparisons\.0\.variant: no variant",
        ),
        ({"confirm_seeds": [2]}, "a seed occurs twice"),
        ({"grid": {"seed": [1]}}, "give one of the two"),
        ({"variants": {}}, "give one of the two"),
        ({"variants": {"plain": {"seed": 3}}}, r"variants\.plain\.seed: is set by the study"),
        ({"metric": ["x"]}, r"metric: unknown key; did you mean `metrics`\?"),
        ({"metrics": []}, "metrics"),
        (
            {"variants": {"plain": {"losses.weight.mlm": 1}}, "comparisons": []},
            r"variant plain.*\n.*did you mean `weights`",
        ),
        ({"base": "none.yaml"}, "config file not found"),
    ],
)
def test_mistakes_are_told_before_anything_runs(study: Callable[..., Study], over: Any, message: str) -> None:
    """Bug: the mistyped key of the last variant is found after the others ran for hours."""
    with pytest.raises(ValueError, match=message):
        study(**over)


def test_a_grid_is_every_combination(study: Callable[..., Study]) -> None:
    """Bug: a grid leaves out combinations, or a variant's name and overrides are of different ones."""
    grid = {"masking.image_ratio": [0.5, 0.75], "masking.text_ratio": [0.2, 0.3]}
    made = study(variants={}, grid=grid, baseline="image_ratio=0.75,text_ratio=0.2", comparisons=[])
    assert list(made.variants) == [f"image_ratio={i},text_ratio={t}" for i in (0.5, 0.75) for t in (0.2, 0.3)]
    masking = made.cell("image_ratio=0.5,text_ratio=0.3", 2).config.masking
    assert (masking.image_ratio, masking.text_ratio) == (0.5, 0.3)


def test_cells_run_once_and_failed_ones_go_on(study: Callable[..., Study], script: Path, tmp_path: Path) -> None:
    """Bug: finished cells run again, one failed cell stops the rest, a begun cell starts anew in its full folder."""
    runs, results, made = tmp_path / "runs", tmp_path / "results", study()
    printed = shell_lines(made, "explore", runs, results, script)
    assert len(printed) == 6
    assert not calls(script)
    with pytest.raises(ValueError, match=r"2 of 6 cells failed(.|\n)*plain, seed 2: see .*log\.txt"):
        run_study(made, "explore", 2, runs, results, script)
    assert len(calls(script)) == 6
    assert len(read_rows(results)) == 4
    run_study(made, "explore", 2, runs, results, script)
    again = calls(script)[6:]
    assert len(again) == 2
    assert all("--resume" in words and "seed=2" in words for words in again)
    assert run_study(made, "explore", 2, runs, results, script) == [
        results / f"mine{s}" for s in (".csv", ".md", ".png")
    ]
    assert len(calls(script)) == 8
    for folder in runs.glob("*/"):
        assert not (folder / "checkpoints").exists()
        assert (folder / "metrics.jsonl").exists()
    variants = {"mine": {}, "half": {"losses.weights.mlm": 0.5}, "new": {"losses.weights.mim": 0.5}}
    other = study(variants=variants, baseline="mine", comparisons=[])
    assert [cell.variant for cell in collect(other.cells("explore"), runs, results)] == ["new"] * 3


def test_what_a_cluster_finished_is_taken_over(study: Callable[..., Study], script: Path, tmp_path: Path) -> None:
    """Bug: the printed commands do not run, or what they leave is never found."""
    runs, results, made = tmp_path / "runs", tmp_path / "results", study()
    runs.mkdir()
    for line in shell_lines(made, "confirm", runs, results, script):
        assert line.startswith("python ")
        subprocess.run([sys.executable, *line.split()[1:]], check=True)
    run_study(made, "confirm", 0, runs, results, script)
    assert len(read_rows(results)) == len(calls(script)) == 2


def test_a_damaged_results_file_is_named(tmp_path: Path) -> None:
    """Bug: a line torn by a kill hides every finished cell behind a traceback, or spoils the line after it."""
    row = {"cell": "a", "metrics": {"m": 1}}
    append_row(tmp_path, row)
    file = tmp_path / "cells.jsonl"
    file.write_text(file.read_text() + '{"cell": "b", "met')
    with pytest.raises(ValueError, match=r"cells\.jsonl:2: is no finished cell"):
        read_rows(tmp_path)
    append_row(tmp_path, {**row, "cell": "c"})
    assert json.loads(file.read_text().splitlines()[-1])["cell"] == "c"


def planted(made: Study, folder: Path) -> None:
    """Rows of known values: `plain` 50, 52, 54; `more` 5, 6, 7 above it; 9 more seven points on the confirming seed."""
    for cell in made.cells("all"):
        value = {0: 50.0, 1: 52.0, 2: 54.0, 7: 60.0}[cell.seed]
        value += {0: 5.0, 1: 6.0, 2: 7.0, 7: 9.0}[cell.seed] if cell.variant == "more" else 0.0
        row = {"cell": cell.identity, "seed": cell.seed, "steps": 30, "samples": 240, "train_s": 9.5}
        append_row(folder, {**row, "metrics": {METRIC: value, OTHER: 1.0, "unplanned": 2.0}})


def test_the_report_holds_the_planted_numbers(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: differences with the wrong sign or baseline, confirming seeds mixed into the explored, metrics swapped."""
    made = study()
    planted(made, tmp_path)
    files = write_report(made, read_rows(tmp_path), tmp_path)
    assert [file.suffix for file in files] == [".csv", ".md", ".png"]
    table = list(csv.DictReader(files[0].read_text().splitlines()))
    assert len(table) == 2 * 4 * 2
    one = [row for row in table if (row["variant"], row["seed"], row["metric"]) == ("more", "1", METRIC)]
    assert [(row["seed_set"], row["value"], row["samples"]) for row in one] == [("explore", "58.0", "240")]
    text = files[1].read_text()
    explored, confirmed = (re.search(rf"## {title}.*?(?=\n## )", text, re.S) for title in ("Explored", "Confirmed"))
    assert explored is not None
    assert confirmed is not None
    # by hand: t(0.975, 2) = 4.3027; s = 1 for the difference, 2 for plain, 3 for more
    assert f"{METRIC} | +6.0 [+3.5, +8.5] | 3 | yes |" in explored[0]
    assert "| plain | 3 | 52.0 [47.0, 57.0] | — | 1.0 [1.0, 1.0] | — |" in explored[0]
    assert "| more | 3 | 58.0 [50.5, 65.5] | +6.0 [+3.5, +8.5] |" in explored[0]
    assert f"{OTHER} | +0.0 [+0.0, +0.0] | 3 | no |" in explored[0]
    assert f"{METRIC} | +9.0 | 1 | one seed |" in confirmed[0]
    assert "unplanned" not in text


def test_unfinished_studies_and_unknown_metrics(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: a report of nothing ends in a traceback; a mistyped metric gives an empty table."""
    made = study()
    assert [file.suffix for file in write_report(made, {}, tmp_path)] == [".csv", ".md"]
    assert "0 of 8 cells finished" in (tmp_path / "mine.md").read_text()
    planted(made, tmp_path)
    with pytest.raises(ValueError, match="no finished cell has the metric probe/none; they have "):
        write_report(study(metrics=["probe/none"]), read_rows(tmp_path), tmp_path)


def test_a_killed_study_goes_on(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: a stopped study leaves its cells training behind it, or repeats a finished cell when it starts again."""
    made = study()
    slow = tmp_path / "slow.py"
    pipe = tmp_path / "pid"
    os.mkfifo(pipe)
    hangs = 'import os\nif len(open(sys.argv[0] + ".calls").readlines()) == 3:\n'
    hangs += '    Path("PIPE").write_text(str(os.getpid()))\n'
    hangs = hangs.replace("PIPE", str(pipe))
    slow.write_text(FAKE_TRAINING.replace("if seed == 2 and", f"{hangs}    time.sleep(60)\nif False and"))
    results = tmp_path / "results"
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from mamo.study.execute import run_study
from mamo.study.plan import read_study
folder = Path({str(tmp_path)!r})
run_study(read_study(folder / "mine.yaml"), "explore", 1, folder / "runs", folder / "results", folder / "slow.py")
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid = int(pipe.read_text())  # waits until the third cell has begun
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    before = len(calls(slow))
    assert before == 3
    run_study(made, "explore", 2, tmp_path / "runs", results, slow)
    assert len(read_rows(results)) == 6
    assert len(calls(slow)) - before == 4
    assert sum("--resume" in words for words in calls(slow)) == 1
