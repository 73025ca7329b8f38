"""The pictures of a run: losses and metrics of its steps over those of a reference run, metrics of its evaluations."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamo.config.schema import RunConfig
from mamo.config.values import flatten
from mamo.training.resume import RESUME_MAY_CHANGE
from mamo.training.run_dir import CONFIG, CURVES, METRICS, read_evaluations, read_jsonl

PANELS = 4
"""Panels a row."""
EVALUATION_PANELS = 2
DASHES = ("-", "--", ":", "-.")
REFERENCES = Path("configs/reference")
"""Of the working folder, or of the clone that the package is in: a run of the config of one is drawn over its band."""
CLONE = Path(__file__).parents[2]
_OF_ANY_VALUE = (*RESUME_MAY_CHANGE, "seed", "training.device", "training.precision", "model.preset")
"""Free to differ from the reference: changes no curve beyond what a seed does; a preset's values are in `model`."""


def plot_curves(output_dir: Path, load_config: Callable[[Path], RunConfig]) -> None:
    """Write `curves.png`: one panel a series, the raw values faint, a running mean on top.

    Where `REFERENCES` holds a run of the same config (see `reference_of`), its running mean plus and minus two running
    standard deviations is the green band below: a run whose mean leaves it is worth a look. `load_config` reads their
    config files.
    """
    rows = read_jsonl(output_dir / METRICS)
    names = [name for name in (rows[0] if rows else {}) if name != "step" and not name.startswith("weight/")]
    if not names:
        return
    steps = np.array([row["step"] for row in rows])
    reference = reference_of(output_dir, load_config)
    expected = read_jsonl(reference / METRICS) if reference is not None else []
    expected = [row for row in expected if row["step"] <= steps[-1]]
    n_rows = -(-len(names) // PANELS)
    figure, axes = _panels(n_rows, PANELS, (4 * PANELS, 2.6 * n_rows))
    for axis, name in zip(axes.flat, names):
        values = np.array([row[name] for row in rows])
        if expected and name in expected[0]:
            low, high = _band(np.array([row[name] for row in expected]))
            axis.fill_between([row["step"] for row in expected], low, high, color="#bfe3c0", label="reference")
        axis.plot(steps, values, color="#9ec1e0", linewidth=0.6)
        axis.plot(steps, _running_mean(values, max(1, len(values) // 50)), color="#1f4e79", linewidth=1.4)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.margins(x=0)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    if reference is not None:
        figure.suptitle(f"green: {REFERENCES / reference.name}, running mean ± 2 standard deviations", fontsize=10)
    figure.savefig(output_dir / CURVES, dpi=100)


def reference_of(output_dir: Path, load_config: Callable[[Path], RunConfig]) -> Path | None:
    """The folder in `REFERENCES` whose run differs from this one in nothing that determines its curves; None for none.

    Resolved configs are compared, keys that one does not have yet at their defaults. Free are the seed, the device, the
    precision and what may differ at a resume (`RESUME_MAY_CHANGE`): folder, workers, layout, checkpoints, evaluation.
    """
    own = _determining(output_dir / CONFIG, load_config)
    if own is None:
        return None
    folders = [path.parent for root in (Path(), CLONE) for path in sorted((root / REFERENCES).glob(f"*/{METRICS}"))]
    return next((folder for folder in folders if _determining(folder / CONFIG, load_config) == own), None)


def _determining(file: Path, load_config: Callable[[Path], RunConfig]) -> dict[str, Any] | None:
    """The values of a run's config that its curves depend on; None where there is none that this version can run."""
    try:
        values = flatten(load_config(file).model_dump())
    except ValueError:
        return None
    return {key: value for key, value in values.items() if not key.startswith(_OF_ANY_VALUE)}


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean minus and plus two standard deviations of what lies around it."""
    width = max(1, len(values) // 50)
    mean = _running_mean(values, width)
    spread = np.sqrt(_running_mean((values - mean) ** 2, width))
    return mean - 2 * spread, mean + 2 * spread


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the `width // 2` on either side of it (fewer at the ends)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    here = np.arange(len(values))
    starts, stops = np.maximum(0, here - width // 2), np.minimum(len(values), here + width // 2 + 1)
    means: np.ndarray = (sums[stops] - sums[starts]) / (stops - starts)
    return means


def plot_evaluations(output_dir: Path) -> bytes | None:
    """A PNG of every metric in `results.json` against the step, one panel a group: what precedes the first slash.

    In a group of three-part names (`probe/count_change/itm`) the colour is the middle's, the dashes are the last's.
    Only evaluations under the last one's protocol are comparable with it; None if there are fewer than two. Sums of
    recalls (`rsum`) are left out: they are the sum of what is drawn, on another scale.

    Raises ValueError for a damaged `results.json`.
    """
    evaluations = read_evaluations(output_dir)
    evaluations = [entry for entry in evaluations if entry["protocol"] == evaluations[-1]["protocol"]]
    if len(evaluations) < 2:
        return None
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(itertools.chain(*(entry["metrics"] for entry in evaluations))):
        if not name.endswith("/rsum"):
            groups.setdefault(name.split("/")[0], []).append(name)
    n_rows = -(-len(groups) // EVALUATION_PANELS)
    size = (6.4 * EVALUATION_PANELS, 3.4 * n_rows)
    figure, axes = _panels(n_rows, EVALUATION_PANELS, size)
    for axis, (group, members) in zip(axes.flat, groups.items()):
        _draw_group(axis, group, members, evaluations)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    found = io.BytesIO()
    figure.savefig(found, dpi=125)
    return found.getvalue()


def _panels(n_rows: int, n_columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of no window and its axes [n_rows, n_columns]."""
    from matplotlib.figure import Figure  # here, as it takes a tenth of the seconds in which a command starts

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _draw_group(axis: Any, group: str, names: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> None:
    """One panel: percent against the step, the names beside it from the highest last value to the lowest."""
    from matplotlib import colormaps  # here, as in `_panels`

    parts = {name: name.removeprefix(f"{group}/").rpartition("/")[::2] for name in names}
    hues = list(dict.fromkeys(stem or leaf for stem, leaf in parts.values()))
    leaves = list(dict.fromkeys(leaf for stem, leaf in parts.values() if stem))
    steps = [entry["step"] for entry in evaluations]
    colours = colormaps["tab10"]
    for name, (stem, leaf) in parts.items():
        hue = hues.index(stem or leaf)
        dashes = DASHES[(leaves.index(leaf) if stem else hue // colours.N) % len(DASHES)]
        values = [entry["metrics"].get(name, np.nan) for entry in evaluations]
        label = name.removeprefix(f"{group}/").replace("_", " ")
        axis.plot(steps, values, dashes, color=colours(hue % colours.N), marker="o", markersize=3, label=label)
    lines, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda k: -np.nan_to_num(lines[k].get_ydata()[-1]))
    axis.legend(
        [lines[k] for k in order], [labels[k] for k in order], fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    axis.set(title=group.replace("_", " "), xlabel="optimizer step", ylabel="percent")
    axis.grid(alpha=0.25)
