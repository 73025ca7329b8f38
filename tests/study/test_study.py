"""Studies: their cells, that nothing runs twice, their reports; a script replaces the training."""

import csv
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mamo.study import execute, results
from mamo.study.execute import harvest_finished, run_study, shell_lines
from mamo.study.published import PUBLISHED
from mamo.study.report import write_report
from mamo.study.results import ITM_BEGINS, append_row, itm_begins_step, read_rows
from mamo.study.spec import Study, config_hash, read_study
from mamo.tasks.registry import load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    p
    for p in (ROOT / "configs/studies").glob("*.yaml")
    if not p.stem.startswith("base") and p.stem != PUBLISHED.removesuffix(".yaml")
)
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
script = Path(sys.argv[0])
with script.with_name("calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
folder.mkdir(exist_ok=True)
(folder / "config.yaml").write_text("seed: 1")
if seed == 2 and "--resume" not in sys.argv:
    sys.exit(1)
if "checkpoint" in settings and not Path(settings["checkpoint"], "checkpoints", "step-0000030").is_dir():
    sys.exit("nothing to start from")
(folder / "checkpoints" / "step-0000030").mkdir(parents=True, exist_ok=True)
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


Program = tuple[str, ...]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Stand in for `mamo`: record each call, fail for seed 2 the first time, else write a run's files."""
    return stand_in(tmp_path / "program", FAKE_TRAINING)


def stand_in(folder: Path, text: str) -> Program:
    """The command line of a script with this text."""
    folder.mkdir()
    (folder / "mamo.py").write_text(text)
    return sys.executable, str(folder / "mamo.py")


def calls(program: Program) -> list[list[str]]:
    """The arguments of the calls of the stand-in."""
    path = Path(program[1]).with_name("calls")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_in_order(path: Path) -> None:
    """Bug: a study that ships names a key or variant that does not exist, or was not planned before it runs."""
    study = read_study(path)
    assert study.file.comparisons
    # MLIM's are five in all, which decide; its file says why they are not the others'
    seeds = ([10, 11, 12, 13, 14], []) if path.stem == "mlim" else ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert (study.seeds("explore"), study.seeds("confirm")) == seeds
    cells = study.trials("all")
    assert len({cell.config_hash for cell in cells}) == len(cells), "two variants are the same run"


def test_committed_trials_are_found_finished() -> None:
    """Bug: a change of the config makes trials unknown that took days."""
    folder = ROOT / "configs/studies/results/2026-11"
    rows = read_rows(folder)
    names = ("losses", "methods", "mim_target", "mlim")
    studies = {name: read_study(folder / f"{name}.yaml") for name in names}
    trials = {name: [trial.config_hash for trial in study.trials("all")] for name, study in studies.items()}
    found = {name: sum(trial in rows for trial in hashes) for name, hashes in trials.items()}
    assert found == {"losses": 35, "methods": 55, "mim_target": 15, "mlim": 20}
    assert rows.keys() <= {found for hashes in trials.values() for found in hashes}


def test_studies_share_their_common_cell() -> None:
    """Bug: each study runs the full method again for itself."""
    assert {"losses", "mask_ratio", "methods", "mim_head", "mim_target", "joint_or_alternate"} <= {
        p.stem for p in SHIPPED
    }
    full = config_hash(load_config(ROOT / "configs/studies/base_scenes.yaml", ["seed=3"]))
    for path in SHIPPED:
        if path.stem == "mlim":  # the other system alone
            continue
        assert full in {cell.config_hash for cell in read_study(path).trials("explore")}, path.stem


def test_identity_is_what_changes_a_result(study: Callable[..., Study]) -> None:
    """Bug: a cell of another seed or setting is taken for finished, or one runs again for its folder's name."""
    base = study().trial("plain", 0)
    assert study("output_dir=elsewhere", "data.workers=3").trial("plain", 0).config_hash == base.config_hash
    assert study("training.checkpoint_every_steps=9").trial("plain", 0).config_hash == base.config_hash
    assert study("losses.weights.mlm=1").trial("plain", 0).config_hash == base.config_hash  # its default, said aloud
    different = [
        study().trial("plain", 1),
        study().trial("more", 0),
        study("evaluation.probe_items=5").trial("plain", 0),
    ]
    different.append(study("data.difficulty=full").trial("plain", 0))
    assert len({cell.config_hash for cell in [base, *different]}) == 5


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"baseline": "plane"}, r"baseline: no variant 'plane'; variants: plain, more"),
        (
            {"comparisons": [{"variant": "x", "against": "plain", "question": "?"}]},
            r"comparisons\.0\.variant: no variant",
        ),
        ({"confirm_seeds": [2]}, "a seed occurs twice"),
        ({"grid": {"seed": [1]}}, "set exactly one of the two"),
        ({"variants": {}}, "set exactly one of the two"),
        ({"variants": {"plain": {"seed": 3}}}, r"variants\.plain\.seed: set by the study itself"),
        ({"metric": ["x"]}, r"metric: unknown key; did you mean `metrics`\?"),
        ({"metrics": []}, "metrics"),
        (
            {"variants": {"plain": {"losses.weight.mlm": 1}}, "comparisons": []},
            r"variant plain.*\n.*did you mean `weights`",
        ),
        ({"base": "none.yaml"}, "config file not found"),
        ({"finetune": "none.yaml"}, "config file not found"),
        ({"variants": {"plain": {"evaluation.enabled": False}}, "comparisons": []}, "plain: evaluation.enabled is fal"),
        ({"variants": {"plain": {"seed_": datetime.date(2024, 1, 2)}}, "comparisons": []}, r"seed_: not a .* a date"),
        ({"grid": {"a": [1, {"b": datetime.date(2024, 1, 2)}]}, "variants": {}}, r"a: not a value of a config"),
        ({"variants": {"plain": {"teacher.momentum": float("nan")}}, "comparisons": []}, r"not a value .* a float"),
        ({"variants": {"plain": {"finetune.seed": 3}}}, r"variants\.plain\.finetune\.seed: set by the study itself"),
        ({"variants": {"plain": {"finetune.data.workers": 1}}, "comparisons": []}, "finetune: unknown key"),
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
    masking = made.trial("image_ratio=0.5,text_ratio=0.3", 2).config.masking
    assert (masking.image_ratio, masking.text_ratio) == (0.5, 0.3)


def test_cells_run_once_and_failed_ones_go_on(study: Callable[..., Study], program: Program, tmp_path: Path) -> None:
    """Bug: finished cells run again, one failed cell stops the rest, a begun cell starts anew in its full folder."""
    runs, results, made = tmp_path / "runs", tmp_path / "results", study()
    printed = shell_lines(made, "explore", runs, results, program)
    assert len(printed) == 6
    assert not calls(program)
    with pytest.raises(ValueError, match=r"2 of 6 trials failed(.|\n)*plain, seed 2: see .*log\.txt"):
        run_study(made, "explore", 2, runs, results, program)
    assert len(calls(program)) == 6
    assert len(read_rows(results)) == 4
    run_study(made, "explore", 2, runs, results, program)
    again = calls(program)[6:]
    assert len(again) == 2
    assert all("--resume" in words and "seed=2" in words for words in again)
    assert run_study(made, "explore", 2, runs, results, program) == [
        results / f"mine{s}" for s in (".csv", ".md", ".png")
    ]
    assert len(calls(program)) == 8
    for folder in runs.glob("*/"):
        assert not (folder / "checkpoints").exists()
        assert (folder / "metrics.jsonl").exists()
    variants = {"mine": {}, "half": {"losses.weights.mlm": 0.5}, "new": {"losses.weights.mim": 0.5}}
    other = study(variants=variants, baseline="mine", comparisons=[])
    assert [cell.variant for cell in harvest_finished(other.trials("explore"), runs, results)] == ["new"] * 3


def test_what_a_cluster_finished_is_taken_over(study: Callable[..., Study], program: Program, tmp_path: Path) -> None:
    """Bug: the printed commands do not run, or what they leave is never found."""
    runs, results, made = tmp_path / "runs", tmp_path / "results", study()
    runs.mkdir()
    for line in shell_lines(made, "confirm", runs, results, program):
        assert line.startswith("python ")
        subprocess.run([sys.executable, *line.split()[1:]], check=True)
    run_study(made, "confirm", 0, runs, results, program)
    assert len(read_rows(results)) == len(calls(program)) == 2


def test_a_damaged_results_file_is_named(tmp_path: Path) -> None:
    """Bug: a line torn by a kill hides every finished cell behind a traceback, or spoils the line after it."""
    row = {"cell": "a", "metrics": {"m": 1}}
    append_row(tmp_path, row)
    file = tmp_path / "cells.jsonl"
    file.write_text(file.read_text() + '{"cell": "b", "met')
    with pytest.raises(ValueError, match=r"cells\.jsonl:2: not a finished trial"):
        read_rows(tmp_path)
    append_row(tmp_path, {**row, "cell": "c"})
    assert json.loads(file.read_text().splitlines()[-1])["cell"] == "c"


TWO_STAGES = {
    "finetune": "second.yaml",
    "variants": {
        "plain": {},
        "tuned": {"finetune.losses.weights.mlm": 0.5},
        "other": {"losses.weights.mim": 0.5},
    },
    "comparisons": [],
}


@pytest.fixture
def two_stages(study: Callable[..., Study], tmp_path: Path) -> Callable[..., Study]:
    """A study that fine-tunes: `plain` and `tuned` share a pre-training, `other` has its own."""
    training = {"total_steps": 30, "batch_size_global": 8, "warmup_steps": 2, "precision": "fp32", "device": "cpu"}
    second = {"output_dir": str(tmp_path / "second"), "training": training, "losses": {"itm_pool_size": 4}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    return lambda *common, **over: study(*common, **{**TWO_STAGES, **over})


def test_identity_of_a_fine_tuning_covers_both_stages(two_stages: Callable[..., Study]) -> None:
    """Bug: a fine-tuning of another pre-training is taken for finished; dropout on and off pre-train twice."""
    made = two_stages()
    plain, tuned, other = (made.trial(name, 0) for name in ("plain", "tuned", "other"))
    assert plain.pretraining is not None
    assert tuned.pretraining is not None
    assert other.pretraining is not None
    assert len({plain.config_hash, tuned.config_hash, other.config_hash, plain.pretraining.config_hash}) == 4
    assert plain.pretraining.config_hash == tuned.pretraining.config_hash != other.pretraining.config_hash
    assert (tuned.config.losses.weights.mlm, tuned.pretraining.config.losses.weights.mlm) == (0.5, 1)
    assert plain.config.model == plain.pretraining.config.model
    assert {plain.config.seed, plain.pretraining.config.seed} == {0}
    longer = two_stages("finetune.training.total_steps=31").trial("plain", 0)
    assert longer.pretraining is not None
    assert longer.pretraining.config_hash == plain.pretraining.config_hash
    assert longer.config_hash != plain.config_hash


def test_fine_tunings_share_their_pretraining(
    two_stages: Callable[..., Study], program: Program, tmp_path: Path
) -> None:
    """Bug: a pre-training runs for each of its fine-tunings, or again after a failure of theirs; a fine-tuning starts
    before it or from another; weights go while a cell still needs them, or stay for ever."""
    runs, results, made = tmp_path / "runs", tmp_path / "results", two_stages(explore_seeds=[2])
    shared = made.trial("plain", 2).pretraining
    assert shared is not None
    weights = runs / shared.config_hash / "checkpoints"
    with pytest.raises(
        ValueError, match=rf"3 of 3 trials failed(.|\n)*tuned, seed 2: see .*{shared.config_hash}\.log\.txt"
    ):
        run_study(made, "explore", 2, runs, results, program)  # the stand-ins fail the first time
    assert [words[0] for words in calls(program)] == ["pretrain"] * 2
    with pytest.raises(ValueError, match="3 of 3 trials failed"):
        run_study(made, "explore", 2, runs, results, program)
    assert sorted(words[0] for words in calls(program)[2:]) == ["finetune"] * 3 + ["pretrain"] * 2
    assert weights.is_dir()
    run_study(made, "explore", 1, runs, results, program)
    last = calls(program)[7:]
    assert [(words[0], "--resume" in words) for words in last] == [("finetune", True)] * 3
    assert sum(f"checkpoint={runs / shared.config_hash}" in words for words in last) == 2
    assert not list(runs.glob("*/checkpoints"))
    rows = read_rows(results)
    assert rows.keys() == {cell.config_hash for cell in made.trials("explore")}
    row = rows[made.trial("other", 2).config_hash]
    assert (row["steps"], row["samples"], row["settings"]["pretraining.losses.weights.mim"]) == (60, 480, 0.5)
    assert row["train_s"] == 4.0  # a batch of 8 at 4 a second, in both stages
    run_study(made, "explore", 1, runs, results, program)
    assert len(calls(program)) == 10


def test_printed_chains_run(two_stages: Callable[..., Study], program: Program, tmp_path: Path) -> None:
    """Bug: a cluster gets a fine-tuning apart from the pre-training that it waits for, or one of them not at all."""
    runs, results, made = tmp_path / "runs", tmp_path / "results", two_stages()
    runs.mkdir()
    lines = shell_lines(made, "confirm", runs, results, program)
    assert len(lines) == 2
    for line in lines:
        subprocess.run(line.replace("python ", f"{sys.executable} "), shell=True, check=True)
    assert [words[0][:3] for words in calls(program)] == ["pre", "fin", "fin", "pre", "fin"]
    run_study(made, "confirm", 0, runs, results, program)
    assert len(read_rows(results)) == 3


KILLED_ONCE = """
import os, runpy, signal, sys
from pathlib import Path
mark = Path(sys.argv[0]).with_name(f"{sys.argv[1]}.calls")
with mark.open("a") as calls:
    calls.write("x")
if mark.name == "finetune.calls" and mark.read_text() == "x":
    os.kill(os.getpid(), signal.SIGKILL)
sys.path.pop(0)
runpy.run_module("mamo", run_name="__main__")
"""


@pytest.mark.slow
def test_two_real_stages_killed_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the commands of a study are not those of the program; a study killed between its stages pre-trains again."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = ["training.total_steps=2", "training.batch_size_global=4", "training.warmup_steps=1", "model.text.layers=1"]
    small += [f"finetune.{word}" for word in small[:3]] + ["finetune.evaluation.probe_items=8"]
    small += ["finetune.data.train_scenes=8", "data.train_scenes=8", "data.image_size_px=16"]
    values = yaml.safe_load((ROOT / "configs/studies/mlim.yaml").read_text())
    for key in ("base", "finetune"):
        values[key] = str(ROOT / "configs/studies" / values[key])
    values |= {"variants": {"mlim": {}}, "comparisons": [], "explore_seeds": [0]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    made = read_study(path, small)
    given = (1, tmp_path / "runs", tmp_path / "results", stand_in(tmp_path / "program", KILLED_ONCE))
    with pytest.raises(ValueError, match="1 of 1 trials failed"):
        run_study(made, "explore", *given)
    run_study(made, "explore", *given)
    counts = {path.name: len(path.read_text()) for path in (tmp_path / "program").glob("*.calls")}
    assert counts == {"pretrain.calls": 1, "finetune.calls": 2}
    (row,) = read_rows(given[2]).values()
    assert (row["steps"], row["samples"]) == (4, 16)
    assert {"matching/pr_auc/both", "matching/pr_auc/image_only", "matching/pr_auc/text_only"} <= row["metrics"].keys()
    own = json.loads((given[1] / row["cell"] / "results.json").read_text())["evaluations"][-1]
    assert made.all_trials[0].pretraining is not None
    assert f"/{made.all_trials[0].pretraining.config_hash}/" in own["ancestry"][-1]["checkpoint"]


def test_the_step_at_which_itm_begins() -> None:
    """Bug: a step too early or late, a mean of fewer than 20 steps, or a run without ITM that fails."""
    high, low = ([{"step": step, "loss/itm": loss} for step in range(1, 100)] for loss in (0.60, 0.44))
    # by hand: with k low ones among 20 the mean is 0.60 - 0.008 k, below 0.57 from k = 4 on
    assert itm_begins_step([*high[:25], *low[25:]]) == 29
    assert itm_begins_step([*high[:25], *low[25:28]]) is None
    assert itm_begins_step([*high[:25], *low[25:28], *high[28:]]) is None
    assert itm_begins_step(low[:19]) is None
    assert itm_begins_step(low[:20]) == 20
    assert itm_begins_step([{"step": step, "loss/itc": 0.1} for step in range(1, 60)]) is None
    # steps without ITM do not count
    assert itm_begins_step([{"step": 0, "loss/itc": 0.1}, *low]) == 20


def test_a_row_has_the_step_at_which_itm_began(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: the step is computed and nobody sees it, or a trial whose ITM did not begin has a step."""
    begins = FAKE_TRAINING.replace('"loss/itc": 1.5,', '"loss/itm": 0.2, "loss/itc": 1.5,').replace(
        "]\n(folder", '] * (25 if "losses.weights.mlm=0.5" in sys.argv else 5)\n(folder', 1
    )
    made = study(explore_seeds=[0], confirm_seeds=[], metrics=[METRIC, ITM_BEGINS], baseline="more")
    run_study(made, "explore", 1, tmp_path / "runs", tmp_path / "results", stand_in(tmp_path / "program", begins))
    rows = read_rows(tmp_path / "results")
    metrics = {trial.variant: rows[trial.config_hash]["metrics"] for trial in made.all_trials}
    assert metrics["more"][ITM_BEGINS] == 30
    assert ITM_BEGINS not in metrics["plain"]
    assert f"{ITM_BEGINS},30.0," in (tmp_path / "results/mine.csv").read_text()


def planted(made: Study, folder: Path, confirming: Mapping[int, float] = {7: 9.0}) -> None:
    """Rows of known values: `plain` 50, 52, 54, confirming 60; `more` 5, 6, 7 above it, confirming as `confirming`."""
    for cell in made.trials("all"):
        value = {0: 50.0, 1: 52.0, 2: 54.0}.get(cell.seed, 60.0)
        value += {0: 5.0, 1: 6.0, 2: 7.0, **confirming}[cell.seed] if cell.variant == "more" else 0.0
        row = {"cell": cell.config_hash, "seed": cell.seed, "steps": 30, "samples": 240, "train_s": 9.5}
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
    assert f"{METRIC} | +6.0 [+3.5, +8.5] | +6.0 [+3.5, +8.5] | 3 | yes |" in explored[0]  # one comparison: as it is
    assert "| plain | 3 | 52.0 [47.0, 57.0] | — | 1.0 [1.0, 1.0] | — |" in explored[0]
    assert "| more | 3 | 58.0 [50.5, 65.5] | +6.0 [+3.5, +8.5] |" in explored[0]
    assert f"{OTHER} | +0.0 [+0.0, +0.0] | — | 3 | no; not more than 0.0 points either way |" in explored[0]
    assert f"{METRIC} | +9.0 | — | 1 | one seed |" in confirmed[0]
    assert "unplanned" not in text


def test_comparisons_are_corrected_and_seeds_are_counted(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: each of several comparisons has its own 5 % of error; or means, not spreads, add seeds."""
    both = [*STUDY["comparisons"], {"variant": "plain", "against": "more", "question": "the other way"}]
    made = study(comparisons=both, smallest_difference=2.0, confirm_seeds=[7, 8, 9])
    planted(made, tmp_path, {7: 9.0, 8: 9.0, 9: 9.0})
    text = write_report(made, read_rows(tmp_path), tmp_path)[1].read_text()
    # by hand: s = 1, n = 3; the smaller p-value is compared with 0.025, t(0.9875, 2) = 6.2053; then 0.05
    assert f"{METRIC} | +6.0 [+3.5, +8.5] | +6.0 [+2.4, +9.6] | 3 | yes |" in text
    assert f"{METRIC} | -6.0 [-8.5, -3.5] | -6.0 [-8.5, -3.5] | 3 | yes |" in text
    # sqrt(2 / 0.4463) = 2.117; t(0.975, 2) * 2.117 / sqrt(3) = 5.26; t(0.975, 6) * 2.117 / sqrt(7) = 1.96
    assert "| more − plain | 1.0 | 3 exploring seeds | 2.1 | 5.3 with 3 | 7 |" in text
    eight = study(comparisons=both, smallest_difference=2.0, confirm_seeds=[*range(7, 15)])
    planted(eight, tmp_path, {seed: float(seed % 2) * 4 for seed in range(7, 15)})
    text = write_report(eight, read_rows(tmp_path), tmp_path)[1].read_text()
    # s = sqrt(4 * 8 / 7) = 2.138; t(0.975, 7) * s / sqrt(8) = 1.79
    assert "| more − plain | 2.1 | 8 confirming seeds | 2.1 | 1.8 with 8 | 8 |" in text


def test_trials_of_different_code_are_not_mixed(
    study: Callable[..., Study], program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a default changes between two trials, whose config hashes do not show it, and one report has both."""
    made, runs, found = study(explore_seeds=[0, 1]), tmp_path / "runs", tmp_path / "results"
    monkeypatch.setattr("mamo.study.results.sources_digest", lambda: "before")
    run_study(made, "explore", 1, runs, found, program)
    assert {row["sources"] for row in read_rows(found).values()} == {"before"}
    monkeypatch.setattr("mamo.study.results.sources_digest", lambda: "after")
    assert run_study(made, "explore", 0, runs, found, program)  # read again, not run again
    with pytest.raises(ValueError, match=r"ran with different code \(after, before\).*cells\.jsonl elsewhere"):
        run_study(made, "confirm", 1, runs, found, program)


def test_the_digest_follows_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a change of one file, or its move, leaves the digest as it is."""
    monkeypatch.setattr(results, "PACKAGE", tmp_path)
    found = set()
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b/a.py", "x = 2"), ("c.txt", "no code")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        results.sources_digest.cache_clear()
        found.add(results.sources_digest())
    results.sources_digest.cache_clear()
    assert len(found) == 3


def test_unfinished_studies_and_unknown_metrics(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: a report of nothing ends in a traceback; a mistyped metric gives an empty table."""
    made = study()
    assert [file.suffix for file in write_report(made, {}, tmp_path)] == [".csv", ".md"]
    assert "0 of 8 cells finished" in (tmp_path / "mine.md").read_text()
    planted(made, tmp_path)
    with pytest.raises(ValueError, match="the baseline plain lacks the metric probe/none; it has "):
        write_report(study(metrics=["probe/none"]), read_rows(tmp_path), tmp_path)


def test_a_killed_study_goes_on(study: Callable[..., Study], tmp_path: Path) -> None:
    """Bug: a stopped study leaves its cells training behind it, or repeats a finished cell when it starts again."""
    made = study()
    pipe = tmp_path / "pid"
    os.mkfifo(pipe)
    hangs = 'import os\nif len(script.with_name("calls").open().readlines()) == 3:\n'
    hangs += '    Path("PIPE").write_text(str(os.getpid()))\n'
    hangs = hangs.replace("PIPE", str(pipe))
    slow = stand_in(
        tmp_path / "slow", FAKE_TRAINING.replace("if seed == 2 and", f"{hangs}    time.sleep(600)\nif False and")
    )
    results = tmp_path / "results"
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from mamo.study.execute import run_study
from mamo.study.spec import read_study
folder = Path({str(tmp_path)!r})
run_study(read_study(folder / "mine.yaml"), "explore", 1, folder / "runs", folder / "results", {slow!r})
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


def test_an_interruption_ends_a_trial_that_is_just_starting(
    study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: Ctrl-C while a trial's process starts misses that process, and the study waits for it to end."""
    made, started = study(), []
    slow = stand_in(tmp_path / "slow", "import time; time.sleep(30)")
    start = subprocess.Popen

    def interrupted_start(*arguments: Any, **keywords: Any) -> "subprocess.Popen[bytes]":
        started.append(start(*arguments, **keywords))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # the main thread handles the signal before this call returns
        return started[-1]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(execute.subprocess, "Popen", interrupted_start)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(made, "explore", 1, tmp_path / "runs", tmp_path / "results", slow)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.returncode for process in started] == [-signal.SIGTERM]
