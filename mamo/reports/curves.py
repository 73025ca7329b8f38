"""Plot the curves of a run: metrics of its steps, with the band of a reference run, and metrics of its evaluations."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mamo.config.schema import RunConfig
from mamo.config.values import Values, flatten
from mamo.evaluation.protocols import current_name
from mamo.reports.compare import (
    WINDOW,
    Floats,
    is_compared,
    metric_band,
    read_metrics,
    running_mean,
    seed_folders,
    smoothed,
)
from mamo.training.resume import RESUME_MAY_CHANGE
from mamo.training.run_dir import CONFIG, CURVES, METRICS, read_evaluations, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 4
"""Panels a row."""
EVALUATION_PANELS = 2
DASHES = ("-", "--", ":", "-.")
REFERENCES = Path("configs/reference")
"""Reference runs, relative to the working folder or to the clone that the package is in."""
CLONE = Path(__file__).parents[2]
_OF_ANY_VALUE = (*RESUME_MAY_CHANGE, "seed", "training.device", "training.precision", "model.preset")
"""Keys that may differ from the reference: they change curves no more than a seed; a preset's values are in `model`."""


def plot_curves(output_dir: Path, load_config: Callable[[Path], RunConfig]) -> None:
    """Write `curves.png`: one panel per metric, the raw values faint, their running mean on top.

    Where `reference_of` finds a reference, the green area is the band of `mamo.reports.compare`, and the line on top is
    the smoothed value that is compared with it. The y axis follows the run's values, so a wide band is cut off.
    `load_config` reads the config files of the runs.
    """
    rows = read_jsonl(output_dir / METRICS)
    names = [name for name in (rows[0] if rows else {}) if name != "step" and not name.startswith("weight/")]
    if not names:
        return
    steps = np.array([row["step"] for row in rows])
    reference = reference_of(output_dir, load_config)
    references = [] if reference is None else [read_metrics(folder) for folder in seed_folders(reference, output_dir)]
    n_rows = -(-len(names) // PANELS)
    figure, axes = panels(n_rows, PANELS, (4 * PANELS, 2.6 * n_rows))
    for axis, name in zip(axes.flat, names):
        values = np.array([row[name] for row in rows], dtype=float)
        band = _reference_band(name, steps, references)
        mean = running_mean(values, max(WINDOW, len(values) // 50)) if band is None else smoothed(name, values)
        axis.margins(x=0)
        axis.plot(steps, values, color="#9ec1e0", linewidth=0.6)
        axis.plot(steps, mean, color="#1f4e79", linewidth=1.4)
        if band is not None:
            limits = axis.get_ylim()
            axis.fill_between(*band, color="#bfe3c0", zorder=0)
            axis.set_ylim(limits)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    if reference is not None:
        figure.suptitle(f"green: band of {REFERENCES / reference.name}, as in compare.py", fontsize=10)
    figure.savefig(output_dir / CURVES, dpi=100)


def reference_of(output_dir: Path, load_config: Callable[[Path], RunConfig]) -> Path | None:
    """Return the reference run whose config agrees with this run's in all that determines its curves; None for none.

    Resolved configs are compared, with defaults for missing keys. The seed, the device, the precision and the keys in
    `RESUME_MAY_CHANGE` (folder, workers, layout, checkpoints, evaluation) may differ.
    """
    own = _determining(output_dir / CONFIG, load_config)
    if own is None:
        return None
    folders = [path.parent for root in (Path(), CLONE) for path in sorted((root / REFERENCES).glob(f"*/{METRICS}"))]
    return next((folder for folder in folders if _determining(folder / CONFIG, load_config) == own), None)


def _determining(file: Path, load_config: Callable[[Path], RunConfig]) -> Values | None:
    """Return the config values that determine a run's curves; None where this version cannot load the config."""
    try:
        values = flatten(load_config(file).model_dump())
    except ValueError:
        return None
    return {key: value for key, value in values.items() if not key.startswith(_OF_ANY_VALUE)}


def _reference_band(
    name: str, steps: np.ndarray, references: Sequence[Mapping[int, Mapping[str, float]]]
) -> tuple[Floats, Floats, Floats] | None:
    """Compute (steps, low, high) of the band over the common steps; None for a metric that is not compared."""
    common = [step for step in steps.tolist() if all(step in rows and name in rows[step] for rows in references)]
    if not references or not common or not is_compared(name):
        return None
    values = np.array([[rows[step][name] for step in common] for rows in references])
    at = np.array(common, dtype=float)
    return at, *metric_band(name, values, at)


def plot_evaluations(output_dir: Path) -> bytes | None:
    """Plot every metric in `results.json` against the step; return a PNG with one panel per first part of the name.

    In a group of three-part names (`probe/count_change/itm`) the middle part sets the colour, the last the dashes. Only
    evaluations of the last one's protocol are plotted; None if there are fewer than two. `rsum` is left out: it is the
    sum of plotted recalls, on another scale.

    Raises ValueError for a damaged `results.json`.
    """
    evaluations = read_evaluations(output_dir)
    evaluations = [entry for entry in evaluations if current_name(entry) == current_name(evaluations[-1])]
    if len(evaluations) < 2:
        return None
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(itertools.chain(*(entry["metrics"] for entry in evaluations))):
        if not name.endswith("/rsum"):
            groups.setdefault(name.split("/")[0], []).append(name)
    n_rows = -(-len(groups) // EVALUATION_PANELS)
    size = (6.4 * EVALUATION_PANELS, 3.4 * n_rows)
    figure, axes = panels(n_rows, EVALUATION_PANELS, size)
    for axis, (group, members) in zip(axes.flat, groups.items()):
        _draw_group(axis, group, members, evaluations)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    found = io.BytesIO()
    figure.savefig(found, dpi=125)
    return found.getvalue()


def panels(n_rows: int, n_columns: int, size: tuple[float, float]) -> tuple["Figure", np.ndarray]:
    """Create a figure without a window and its axes [n_rows, n_columns]."""
    from matplotlib.figure import Figure  # imported here, as it slows the start of every command

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _draw_group(axis: "Axes", group: str, names: Sequence[str], evaluations: Sequence[Values]) -> None:
    """Draw one panel: percent against the step; the legend is ordered by the last value, highest first."""
    from matplotlib import colormaps  # imported here, as in `panels`

    parts = {name: name.removeprefix(f"{group}/").rpartition("/")[::2] for name in names}
    hues = list(dict.fromkeys(stem or leaf for stem, leaf in parts.values()))
    leaves = list(dict.fromkeys(leaf for stem, leaf in parts.values() if stem))
    steps = [entry["step"] for entry in evaluations]
    colours = colormaps["tab10"]
    last: list[float] = []
    for name, (stem, leaf) in parts.items():
        hue = hues.index(stem or leaf)
        dashes = DASHES[(leaves.index(leaf) if stem else hue // colours.N) % len(DASHES)]
        values = [entry["metrics"].get(name, np.nan) for entry in evaluations]
        label = name.removeprefix(f"{group}/").replace("_", " ")
        axis.plot(steps, values, dashes, color=colours(hue % colours.N), marker="o", markersize=3, label=label)
        last.append(float(np.nan_to_num(values[-1])))
    lines, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda k: -last[k])
    axis.legend(
        [lines[k] for k in order], [labels[k] for k in order], fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    axis.set(title=group.replace("_", " "), xlabel="optimizer step", ylabel="percent")
    axis.grid(alpha=0.25)
