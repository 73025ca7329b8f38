"""`mamo aggregate-folds`: the held-out statements of six runs as one accuracy."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mamo.cli import main
from mamo.evaluation.metrics.statements import StatementRecord, write_scores
from mamo.training.run_dir import STATEMENT_SCORES, read_evaluations


def make_run(folder: Path, directory: str, recall: float, shift: float, metric: str = "statements/accuracy") -> str:
    """A run that held out `directory` and separates true from false at the threshold `shift`."""
    folder.mkdir()
    labels = [True, False, False]
    records = [StatementRecord(f"/x/{k}.png", f"sentence {k}", label, directory) for k, label in enumerate(labels)]
    write_scores(folder / STATEMENT_SCORES, np.where(labels, 1.0, -1.0) + shift, records)
    protocol = "records-reasoning" if metric == "reasoning/accuracy" else "pairs-zeroshot"
    entry = {"protocol": protocol, "checkpoint": "checkpoints/step-1", "step": 1, "seed": 0, "versions": {}}
    metrics = {"itc/i2t_r1": recall, metric: 0.0}
    (folder / "results.json").write_text(json.dumps({"evaluations": [{**entry, "metrics": metrics}]}))
    return str(folder)


def aggregate(*arguments: str) -> None:
    main(["aggregate-folds", *arguments])


def test_folds_are_aggregated(tmp_path: Path) -> None:
    """Bug: the mean of six accuracies at threshold 0, or a threshold fitted on the statements that it judges."""
    runs = [make_run(tmp_path / f"fold-{k}", str(k), 10.0 * k, shift=3.0) for k in range(3)]
    aggregate(*runs, "--to", str(tmp_path / "results.json"))
    (entry,) = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert entry["metrics"]["itc/i2t_r1"] == pytest.approx(10.0)
    assert entry["metrics"]["statements/accuracy"] == 100  # at threshold 0 all would be called true
    assert entry["metrics"]["statements/majority"] == pytest.approx(200 / 3)
    assert entry["checkpoint"][2] == "fold-2/checkpoints/step-1"


def test_predictions_are_aggregated_at_the_threshold_of_the_head(tmp_path: Path) -> None:
    """Bug: a threshold fitted to a head that has its own, or an interval that is the mean of six."""
    runs = [make_run(tmp_path / f"fold-{k}", str(k), 0.0, 3.0, "reasoning/accuracy") for k in range(3)]
    aggregate(*runs, "--to", str(tmp_path / "results.json"))
    (entry,) = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert entry["protocol"] == "records-reasoning-folds"
    assert read_evaluations(tmp_path) == [entry]  # although it is of no one step
    metrics = entry["metrics"]
    assert metrics["reasoning/accuracy"] == pytest.approx(100 / 3)  # logits of 4 and 2: all are called true
    assert metrics["reasoning/interval_low"] <= 100 / 3 <= metrics["reasoning/interval_high"]
    assert not any(name.startswith("statements/") for name in metrics)


def test_folds_that_cannot_be_aggregated(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Bug: a fold counted twice, and a traceback for a run that was never evaluated."""
    first, again = (make_run(tmp_path / name, "4", 1.0, 0.0) for name in ("a", "b"))
    (tmp_path / "empty").mkdir()
    for runs, message in (((first, again), "also held out directory 4"), ((str(tmp_path / "empty"),), "no evaluated")):
        assert message in fails(lambda runs=runs: aggregate(*runs, "--to", str(tmp_path / "r.json")))
        assert not (tmp_path / "r.json").exists()


def test_runs_of_two_tasks_are_not_aggregated(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Bug: ITM scores and logits of a head in one accuracy, or a KeyError."""
    runs = [make_run(tmp_path / "a", "0", 1.0, 0.0), make_run(tmp_path / "b", "1", 1.0, 0.0, "reasoning/accuracy")]
    assert "different protocols" in fails(lambda: aggregate(*runs, "--to", str(tmp_path / "r.json")))
