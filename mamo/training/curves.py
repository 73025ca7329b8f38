"""The picture of a run: every loss and metric of `metrics.jsonl` against the step, over those of a reference run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mamo.training.run_folder import CURVES, METRICS, read_lines

PANELS = 4
"""Panels a row."""


REFERENCES = Path("configs/reference")
"""A run whose folder has the name of one in here (`runs/scenes`: `configs/reference/scenes`) is drawn over its band."""


def draw_curves(output_dir: Path) -> None:
    """Write `curves.png`: one panel a series, the raw values faint, a running mean on top.

    Where `REFERENCES` holds a run of this folder's name, its running mean plus and minus two running standard
    deviations is the green band below: a run of the same config whose mean leaves it is worth a look.
    """
    rows = read_lines(output_dir / METRICS)
    names = [name for name in (rows[0] if rows else {}) if name != "step" and not name.startswith("weight/")]
    if not names:
        return
    steps = np.array([row["step"] for row in rows])
    reference = REFERENCES / output_dir.resolve().name / METRICS
    expected = read_lines(reference) if reference.is_file() else []
    expected = [row for row in expected if row["step"] <= steps[-1]]
    n_rows = -(-len(names) // PANELS)
    figure, axes = plt.subplots(n_rows, PANELS, figsize=(4 * PANELS, 2.6 * n_rows), squeeze=False, layout="constrained")
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
    if expected:
        figure.suptitle(f"green: {reference.parent}, running mean ± 2 standard deviations", fontsize=10)
    figure.savefig(output_dir / CURVES, dpi=100)
    plt.close(figure)


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
