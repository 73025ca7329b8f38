"""Finished trials, one line of `cells.jsonl` each; the file is committed and shared by all studies."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mamo.config.values import Values
from mamo.study.spec import Trial, changed_settings
from mamo.training.run_dir import METRICS, RESULTS, TIMING, atomic_write_text, read_evaluations, read_jsonl

TRIALS = "cells.jsonl"
PACKAGE = Path(__file__).parents[1]
ITM_BEGINS = "itm_begins_step"
"""Name of the metric: a step, not a percentage. Absent where ITM does not begin."""
_ITM_WINDOW, _ITM_BEGUN = 20, 0.57
Row = Values


def read_rows(folder: Path) -> dict[str, Row]:
    """Read the finished trials by config hash. Raises ValueError, naming file and line, for a malformed line."""
    path = folder / TRIALS
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = {**row, "metrics": {name: float(value) for name, value in row["metrics"].items()}}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}:{number}: not a finished trial; remove the line, and the trial runs again"
            ) from None
    return rows


def latest_results(folder: Path) -> Path:
    """Return the folder of the newest finished trials.

    Args:
        folder: `results` of the studies. Trials of earlier code are in its subfolders, named `YYYY-MM`, each with the
            study files that it was made by.

    Returns:
        `folder` itself, or else its newest subfolder with finished trials; `folder` where none has any.
    """
    folders = [folder, *sorted(folder.glob("[0-9]*-[0-9]*"), reverse=True)]
    return next((found for found in folders if (found / TRIALS).is_file()), folder)


def append_row(folder: Path, row: Row) -> None:
    """Append one trial in a single write, so that studies which run at the same time can share the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRIALS
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")


@functools.cache
def sources_digest() -> str:
    """Return 12 hex digits of the package's Python files: a changed default changes no config hash."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def note_sources(trial: Trial, runs: Path) -> None:
    """Note the code with which a trial starts or resumes, next to its folder."""
    file = _sources_file(trial, runs)
    noted = file.read_text().split() if file.exists() else []
    if sources_digest() not in noted:
        atomic_write_text(file, " ".join([*noted, sources_digest()]))


def _sources_of(trial: Trial, runs: Path) -> str:
    """Return the code of a trial and its pre-training: one digest, or several joined by a plus sign."""
    stages = [trial] if trial.pretraining is None else [trial.pretraining, trial]
    files = [_sources_file(stage, runs) for stage in stages]
    noted = [digest for file in files for digest in (file.read_text().split() if file.exists() else [sources_digest()])]
    return "+".join(dict.fromkeys(noted))


def _sources_file(trial: Trial, runs: Path) -> Path:
    return runs / f"{trial.config_hash}.sources.txt"


def finished_row(trial: Trial, runs: Path) -> Row | None:
    """Read the results of a trial from its folder in `runs`; None if it has not finished.

    Steps, samples and seconds include those of its pre-training, whose settings are named `pretraining.KEY`.
    """
    run_folder, total = runs / trial.config_hash, trial.config.training.total_steps
    if not (run_folder / RESULTS).exists():
        return None
    last = [entry for entry in read_evaluations(run_folder) if entry["step"] == total]
    if not last:
        return None
    stages = [trial] if trial.pretraining is None else [trial.pretraining, trial]
    training = [stage.config.training for stage in stages]
    settings = _flat(changed_settings(trial.config))
    if trial.pretraining is not None:
        settings |= _flat(changed_settings(trial.pretraining.config), "pretraining.")
    return {
        "cell": trial.config_hash,
        "seed": trial.seed,
        "steps": sum(one.total_steps for one in training),
        "samples": sum(one.total_steps * one.batch_size_global for one in training),
        "train_s": round(sum(_train_s(stage, runs) for stage in stages), 1),
        "settings": settings,
        "versions": last[-1]["versions"],
        "sources": _sources_of(trial, runs),
        "losses": _flat(_last_losses(run_folder)),
        "metrics": {name: round(value, 4) for name, value in last[-1]["metrics"].items()} | _start_of_itm(stages, runs),
    }


def _train_s(trial: Trial, runs: Path) -> float:
    rates = [row["samples_per_s"] for row in read_jsonl(runs / trial.config_hash / TIMING)]
    seconds: float = sum(trial.config.training.batch_size_global / rate for rate in rates)
    return seconds


def _start_of_itm(stages: Sequence[Trial], runs: Path) -> dict[str, float]:
    """Return `ITM_BEGINS` of the first stage in which ITM begins; empty where it does in none."""
    for stage in stages:
        step = itm_begins_step(read_jsonl(runs / stage.config_hash / METRICS))
        if step is not None:
            return {ITM_BEGINS: float(step)}
    return {}


def itm_begins_step(rows: Sequence[Values]) -> int | None:
    """Return the first step at which the mean ITM loss of the last 20 steps is below 0.57; None if there is none.

    A predictor of the class frequencies has 0.6365 nats, at which the loss stays for hundreds of steps.

    Args:
        rows: of `metrics.jsonl`, in the order of the steps.
    """
    losses = [row["loss/itm"] for row in rows if "loss/itm" in row]
    steps = [row["step"] for row in rows if "loss/itm" in row]
    for end in range(_ITM_WINDOW, len(losses) + 1):
        if sum(losses[end - _ITM_WINDOW : end]) / _ITM_WINDOW < _ITM_BEGUN:
            return int(steps[end - 1])
    return None


def _last_losses(run_folder: Path, window: int = 20) -> dict[str, float]:
    """Average each loss over the last steps."""
    rows = read_jsonl(run_folder / METRICS)[-window:]
    names = [name for name in rows[-1] if name.startswith("loss/")] if rows else []
    return {name.removeprefix("loss/"): round(sum(row[name] for row in rows) / len(rows), 4) for name in names}


def _flat(values: Mapping[str, object], prefix: str = "") -> Values:
    flat: Values = {}
    for key, value in values.items():
        if key != "output_dir":
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
