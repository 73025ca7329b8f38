"""The picture of a run: every loss and metric of `metrics.jsonl` against the step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mamo.training.run_folder import CURVES, METRICS, read_lines

PANELS = 4
"""Panels a row."""


def draw_curves(output_dir: Path) -> None:
    """Write `curves.png`: one panel a series, the raw values faint, a running mean on top."""
    rows = read_lines(output_dir / METRICS)
    names = [name for name in (rows[0] if rows else {}) if name != "step" and not name.startswith("weight/")]
    if not names:
        return
    steps = np.array([row["step"] for row in rows])
    n_rows = -(-len(names) // PANELS)
    figure, axes = plt.subplots(n_rows, PANELS, figsize=(4 * PANELS, 2.6 * n_rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        values = np.array([row[name] for row in rows])
        axis.plot(steps, values, color="#9ec1e0", linewidth=0.6)
        axis.plot(steps, _running_mean(values, max(1, len(values) // 50)), color="#1f4e79", linewidth=1.4)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.margins(x=0)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    figure.savefig(output_dir / CURVES, dpi=100)
    plt.close(figure)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the `width - 1` before it (fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - width)
    means: np.ndarray = (sums[stops] - sums[starts]) / (stops - starts)
    return means
