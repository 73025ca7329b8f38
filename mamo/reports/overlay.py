"""Lay the curves of several runs over each other, with a table of their last numbers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamo.config.values import Values, flatten, read_values
from mamo.reports.compare import WINDOW, running_mean
from mamo.reports.curves import PANELS, panels
from mamo.training.run_dir import CONFIG, METRICS, read_evaluations, read_jsonl

_OF_EVERY_RUN = ("output_dir", "training.precision", "training.device")
"""Keys that differ between any two runs and say nothing of their curves."""


def read_runs(folders: Sequence[Path]) -> dict[str, list[Values]]:
    """Read the metrics of runs by name; a name is the part of the path by which the folders differ.

    Raises:
        ValueError: a folder has no metrics, or one is named twice.
    """
    found: dict[str, list[Values]] = {}
    shared = len(Path(*_common_parts(folders)).parts)
    for folder in folders:
        if not (folder / METRICS).is_file():
            raise ValueError(f"{folder}: no {METRICS}; name the folder of a run")
        rows = read_jsonl(folder / METRICS)
        if not rows:
            raise ValueError(f"{folder / METRICS}: no step yet; wait for the first")
        name = str(Path(*folder.absolute().parts[shared:])) if len(folders) > 1 else folder.name
        if name in found:
            raise ValueError(f"{folder}: named twice; name each run once")
        found[name] = rows
    return found


def _common_parts(folders: Sequence[Path]) -> list[str]:
    parts = [folder.absolute().parts[:-1] for folder in folders]
    return [several[0] for several in zip(*parts) if len(set(several)) == 1] if parts else []


def draw_runs(runs: dict[str, list[Values]], metrics: Sequence[str], file: Path) -> None:
    """Write a picture of the running means of some metrics, by default of all losses and accuracies; a panel each.

    Args:
        runs: rows of metrics by name.
        metrics: names, or their beginnings.
        file: a .png, .svg or .pdf.

    Raises:
        ValueError: no run has such a metric, or the file has another suffix.
    """
    from matplotlib import colormaps  # here, as it slows the start of every command

    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--to: {file}: pictures are .png, .svg or .pdf files")
    names = _metrics_of(runs, metrics)
    n_rows = -(-len(names) // PANELS)
    columns = min(PANELS, len(names))
    figure, axes = panels(n_rows, columns, (4 * columns, 2.8 * n_rows))
    colours = colormaps["tab10"]
    for axis, name in zip(axes.flat, names):
        for number, (run, rows) in enumerate(runs.items()):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                steps, values = np.array(points, dtype=float).T
                mean = running_mean(values, max(WINDOW, len(values) // 50))
                axis.plot(steps, mean, color=colours(number % colours.N), linewidth=1.2, label=run)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.margins(x=0)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines))
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=min(4, len(handles)), fontsize=9
    )
    figure.savefig(file, dpi=120)


def _metrics_of(runs: dict[str, list[Values]], wanted: Sequence[str]) -> list[str]:
    every = list(dict.fromkeys(name for rows in runs.values() for name in rows[0] if name != "step"))
    if not wanted:
        return [name for name in every if name.startswith("loss/") or name.endswith("accuracy")] or every
    found = [name for name in every if any(name == one or name.startswith(one) for one in wanted)]
    if not found:
        raise ValueError(f"--metric: no run has {wanted[0]!r}; there are {', '.join(every)}")
    return found


def last_numbers(folders: Sequence[Path], runs: dict[str, list[Values]], metrics: Sequence[str]) -> list[str]:
    """Return a Markdown table: the keys in which the configs differ, the last values, the last evaluation's numbers.

    A last value is the mean of the last `WINDOW` steps.
    """
    rows: dict[str, list[str]] = {}
    configs = [flatten(read_values(folder / CONFIG)) if (folder / CONFIG).is_file() else {} for folder in folders]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    for key in keys:
        values = [config.get(key) for config in configs]
        if key not in _OF_EVERY_RUN and any(value != values[0] for value in values):
            rows[f"`{key}`"] = [str(value) for value in values]
    rows["steps"] = [str(found[-1]["step"]) for found in runs.values()]
    for name in _metrics_of(runs, metrics):
        rows[f"`{name}`"] = [_mean([row[name] for row in found[-WINDOW:] if name in row]) for found in runs.values()]
    last = [evaluations[-1]["metrics"] if (evaluations := read_evaluations(folder)) else {} for folder in folders]
    for name in dict.fromkeys(name for numbers in last for name in numbers):
        rows[f"`{name}`"] = [f"{numbers[name]:.1f}" if name in numbers else "" for numbers in last]
    head = ["", *runs]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _mean(values: Sequence[float]) -> str:
    return f"{math.fsum(values) / len(values):.4g}" if values else ""
