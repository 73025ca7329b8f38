"""Trackers that a config names: Weights & Biases (offline), classes from outside, and what is not installed."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mamo.trainer import train
from mamo.training.run_dir import METRICS, read_jsonl
from mamo.training.trackers import WANDB_ID, check_named_trackers, open_trackers
from tests.tiny import TWO_STEPS, config_of


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.rows, self.is_finished = options, list[dict[str, float]](), False
        self.settings = SimpleNamespace(mode=options["mode"])

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float]) -> None:
        self.rows.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs of a stand-in for wandb, which sends nothing."""
    found: list[FakeRun] = []
    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]
    module.init = lambda **options: found.append(FakeRun(options)) or found[-1]  # type: ignore[attr-defined,func-returns-value]
    module.Settings = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    return found


def test_wandb_gets_each_step_and_keeps_its_run(runs: list[FakeRun], tmp_path: Path, no_curves: None) -> None:
    """Bug: a resumed run is a second one there, steps or evaluations are missing, nothing is closed, it is online
    without a key, or TensorBoard is written though it is not named.
    """
    logs = {"trackers": ["wandb"], "project": "kites"}
    config = config_of(output_dir=str(tmp_path / "run"), training=TWO_STEPS, logging=logs)
    train(config, is_resume=False)
    train(config, is_resume=True)
    first, second = runs
    assert first.options["id"] == second.options["id"] == (tmp_path / "run" / WANDB_ID).read_text()
    assert (first.options["project"], first.options["mode"]) == ("kites", "offline")
    assert first.options["resume"] == "allow"
    assert first.options["config"]["training"]["total_steps"] == 2
    assert all(run.is_finished for run in runs)
    written = read_jsonl(tmp_path / "run" / METRICS)
    steps = [row for row in first.rows if "loss/itc" in row]
    assert [{key: row[key] for key in written[0]} for row in steps] == written
    assert "samples_per_s" in steps[0]
    assert not (tmp_path / "run/tensorboard").exists()


def test_the_real_wandb_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an option that their library does not have, a question at the terminal, or files elsewhere."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(output_dir=str(tmp_path), logging={"trackers": ["wandb"]})
    (tracker,) = open_trackers(config, 0)
    tracker.log(1, {"loss/itc": 2.0})
    tracker.close()
    (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{(tmp_path / WANDB_ID).read_text()}.wandb")
    assert file.stat().st_size > 0


class Own:
    """A tracker from outside."""

    made: list["Own"] = []  # noqa: RUF012

    def __init__(self, folder: Path, config: Any, first_step: int) -> None:
        if config.seed == 13:
            raise RuntimeError("no server\nat all")
        self.given, self.steps = (folder, config.seed, first_step), list[int]()
        Own.made.append(self)

    def log(self, step: int, values: Any) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


def test_a_class_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a tracker by import path is not made, or one that cannot start ends the run."""
    module = ModuleType("own_trackers")
    module.Own, module.function, module.Half = Own, print, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_trackers", module)
    logs = {"trackers": ["own_trackers:Own"]}
    config = config_of(output_dir=str(tmp_path), logging=logs)
    check_named_trackers(config)
    (made,) = open_trackers(config, 4)
    assert isinstance(made, Own)
    assert made.given == (tmp_path, config.seed, 5)
    with caplog.at_level(logging.WARNING):
        assert open_trackers(config_of(output_dir=str(tmp_path), logging=logs, seed=13), 4) == []
    assert (
        "the tracker own_trackers:Own failed at its start; the run goes on without it: RuntimeError no server at all"
        in (caplog.text)
    )
    for name in ("own_trackers:function", "own_trackers:Half"):
        with pytest.raises(
            ValueError, match=rf"logging\.trackers\.0: {name} is no class with the methods log and close"
        ):
            check_named_trackers(config_of(logging={"trackers": [name]}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "logging.trackers.1: wandb is not installed; use `pip install mamo[wandb]`, or remove it"),
        (
            "mlflow",
            "logging.trackers.1: use tensorboard, wandb or the import path of a class, module:Class ('mlflow' found)",
        ),
        ("nowhere:Tracker", "logging.trackers.1: no module 'nowhere' for nowhere:Tracker"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Bug: the run trains for hours without its tracker, or ends in the import's traceback after the first step."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of(output_dir=str(tmp_path / "run"), logging={"trackers": ["tensorboard", name]})
    found = fails(lambda: train(config, is_resume=False))
    assert message in found
    assert found.count("\n") == 1
    assert not (tmp_path / "run").exists()
