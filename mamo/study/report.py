"""Write the report of a study: a tidy CSV, Markdown tables, figures."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mamo.study.results import TRIALS, Row
from mamo.study.spec import SeedSet, Study, Trial
from mamo.study.statistics import (
    MOST_SEEDS,
    Estimate,
    differences,
    half_width,
    holm_intervals,
    interval,
    paired_difference,
    seeds_needed,
    upper_spread,
)
from mamo.training.run_dir import atomic_write_text

Values = dict[str, dict[int, float]]
"""Variant -> seed -> value of one metric."""
SPREAD_SEEDS = 8
"""Confirming seeds after which their spread, not their mean, may add further ones."""
_PANELS_A_ROW = 4
_TITLES: dict[SeedSet, str] = {"explore": "Explored", "confirm": "Confirmed", "all": "All seeds"}


def write_report(study: Study, rows: Mapping[str, Row], folder: Path) -> list[Path]:
    """Write `NAME.csv`, `NAME.md` and `NAME.png` from the finished trials.

    Returns:
        The files written; the figure only if a trial has finished.

    Raises:
        ValueError: the baseline lacks a planned metric (other variants show a dash), or trials ran with different code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = study.trials("all")
    finished = [(trial, rows[trial.config_hash]) for trial in trials if trial.config_hash in rows]
    sources = sorted({str(row.get("sources", "unknown")) for _, row in finished})
    if len(sources) > 1:
        raise ValueError(
            f"{study.name}: its finished trials ran with different code ({', '.join(sources)}), so that they cannot be "
            f"compared; move {folder / TRIALS} elsewhere, and run all of them again"
        )
    for trial, row in finished:
        for metric in study.file.metrics if trial.variant == study.file.baseline else []:
            if metric not in row["metrics"]:
                known = ", ".join(sorted(row["metrics"]))
                raise ValueError(
                    f"{study.name}: the baseline {trial.variant} lacks the metric {metric}; it has {known}"
                )
    files = [folder / f"{study.name}{suffix}" for suffix in (".csv", ".md", ".png")]
    atomic_write_text(files[0], tidy(study, finished))
    atomic_write_text(files[1], markdown(study, trials, rows))
    if not finished:
        return files[:2]
    draw(study, finished, files[2])
    return files


def tidy(study: Study, finished: list[tuple[Trial, Row]]) -> str:
    """Format a CSV with one line per planned metric of a trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "variant", "seed", "seed_set", "steps", "samples", "train_s", "metric", "value", "cell"])
    for trial, row in finished:
        seed_set = "explore" if trial.seed in study.file.explore_seeds else "confirm"
        for metric in study.file.metrics:
            if metric in row["metrics"]:
                cost = [row["steps"], row["samples"], row["train_s"]]
                value = row["metrics"][metric]
                writer.writerow(
                    [study.name, trial.variant, trial.seed, seed_set, *cost, metric, value, trial.config_hash]
                )
    return text.getvalue()


def values_of(study: Study, rows: Mapping[str, Row], metric: str, chosen: SeedSet) -> Values:
    """Collect the finished values of one metric; a variant without any stays, empty."""
    found: Values = {name: {} for name in study.variants}
    for trial in study.trials(chosen):
        row = rows.get(trial.config_hash)
        if row is not None and metric in row["metrics"]:
            found[trial.variant][trial.seed] = row["metrics"][metric]
    return found


def markdown(study: Study, trials: list[Trial], rows: Mapping[str, Row]) -> str:
    """Format the tables: explored and confirmed seeds apart, then together; planned comparisons first in each."""
    file = study.file
    n_finished = sum(trial.config_hash in rows for trial in trials)
    lines = [f"# {study.name}", "", file.question.strip(), ""]
    lines += [
        f"{n_finished} of {len(trials)} cells finished (variants times seeds); metrics in percent, mean and 95 % "
    ]
    lines[-1] += f"interval over seeds (t); differences are paired by seed. Baseline: {file.baseline}."
    is_confirming = any(trial.config_hash in rows for trial in study.trials("confirm"))
    sets: tuple[SeedSet, ...] = ("explore", "confirm", "all") if is_confirming else ("explore",)
    for chosen in sets:
        of_metric = {metric: values_of(study, rows, metric, chosen) for metric in file.metrics}
        if not any(values for by_variant in of_metric.values() for values in by_variant.values()):
            continue
        seeds = ", ".join(str(seed) for seed in study.seeds(chosen))
        lines += ["", f"## {_TITLES[chosen]}: seeds {seeds}"]
        lines += _comparisons(study, of_metric)
        lines += _table(study, of_metric)
    return "\n".join([*lines, *_power(study, rows)]) + "\n"


def _comparisons(study: Study, of_metric: Mapping[str, Values]) -> list[str]:
    """Format the planned comparisons; intervals of the first metric also corrected for their number (Holm)."""
    if not study.file.comparisons:
        return []
    lines = [
        "",
        "| planned comparison | metric | difference | corrected | seeds | interval excludes zero |",
        "|---|---|---|---|---|---|",
    ]
    corrected = _corrected(study, of_metric[study.file.metrics[0]])
    for number, planned in enumerate(study.file.comparisons):
        for metric, values in of_metric.items():
            difference = paired_difference(values[planned.variant], values[planned.against])
            if difference is None:
                continue
            decisive = corrected.get(number) if metric == study.file.metrics[0] else None
            shown = "—" if decisive is None else format_interval(decisive, signed=True)
            what = f"{planned.variant} − {planned.against} ({planned.question})"
            cells = (what, metric, format_interval(difference, signed=True), shown, difference.n)
            lines.append(f"| {' | '.join(map(str, cells))} | {_verdict(decisive or difference)} |")
    return lines


def _corrected(study: Study, values: Values) -> dict[int, Estimate]:
    """Return the corrected interval of each planned comparison, by its number; those without two seeds are absent."""
    samples = {
        number: differences(values[planned.variant], values[planned.against])
        for number, planned in enumerate(study.file.comparisons)
    }
    samples = {number: sample for number, sample in samples.items() if len(sample) > 1}
    return dict(zip(samples, holm_intervals(list(samples.values()))))


def _verdict(estimate: Estimate) -> str:
    """Say whether an interval excludes zero, and if not, which differences it excludes."""
    if estimate.n == 1:
        return "one seed"
    if estimate.excludes_zero:
        return "yes"
    return f"no; not more than {max(abs(estimate.low), abs(estimate.high)):.1f} points either way"


def _power(study: Study, rows: Mapping[str, Row]) -> list[str]:
    """Format how many confirming seeds each comparison needs, by the spread of the seeds that ran.

    Exploring seeds give an upper bound of the spread (`upper_spread`). Once `SPREAD_SEEDS` confirming ones ran, their
    spread counts instead, and no mean.
    """
    file = study.file
    if file.smallest_difference is None:
        return []
    lines = [
        "",
        f"## Seeds for intervals of ± {file.smallest_difference:g} points of {file.metrics[0]}",
        "",
        "| planned comparison | spread | from | bound | half width | seeds needed |",
        "|---|---|---|---|---|---|",
    ]
    n_planned = len(file.confirm_seeds)
    explored, confirmed = (values_of(study, rows, file.metrics[0], chosen) for chosen in ("explore", "confirm"))
    for planned in file.comparisons:
        sample = differences(confirmed[planned.variant], confirmed[planned.against])
        is_confirmed = len(sample) >= SPREAD_SEEDS
        if not is_confirmed:
            sample = differences(explored[planned.variant], explored[planned.against])
        if len(sample) < 2 or n_planned < 2:
            continue
        spread = float(np.std(sample, ddof=1))
        bound = spread if is_confirmed else upper_spread(spread, len(sample))
        source = f"{len(sample)} {'confirming' if is_confirmed else 'exploring'} seeds"
        n = max(n_planned, len(sample) if is_confirmed else 0)
        needed = seeds_needed(bound, file.smallest_difference, n)
        is_enough = half_width(bound, needed) <= file.smallest_difference
        cells = (f"{planned.variant} − {planned.against}", f"{spread:.1f}", source, f"{bound:.1f}")
        widths = (f"{half_width(bound, n):.1f} with {n}", f"{needed}" if is_enough else f"more than {MOST_SEEDS}")
        lines.append(f"| {' | '.join((*cells, *widths))} |")
    return lines if len(lines) > 6 else []


def _table(study: Study, of_metric: Mapping[str, Values]) -> list[str]:
    baseline = study.file.baseline
    heads = [name for metric in of_metric for name in (metric, f"− {baseline}")]
    lines = ["", f"| variant | seeds | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for variant in study.variants:
        columns = []
        for values in of_metric.values():
            own = values[variant]
            difference = paired_difference(own, values[baseline]) if variant != baseline else None
            columns += [format_interval(interval(list(own.values()))) if own else "—"]
            columns += [format_interval(difference, signed=True) if difference else "—"]
        n_seeds = max(len(values[variant]) for values in of_metric.values())
        lines.append(f"| {variant} | {n_seeds} | {' | '.join(columns)} |")
    return lines


def format_interval(estimate: Estimate, signed: bool = False) -> str:
    """Format `58.1 [55.0, 61.2]`; a single value without interval."""
    sign = "+" if signed else ""
    mean = f"{estimate.mean:{sign}.1f}"
    return mean if math.isnan(estimate.low) else f"{mean} [{estimate.low:{sign}.1f}, {estimate.high:{sign}.1f}]"


def draw(study: Study, finished: list[tuple[Trial, Row]], to: Path) -> None:
    """Draw one panel per metric: a map of means over a grid of two keys, else dots by seed and mean with interval."""
    metrics = study.file.metrics
    rows = {trial.config_hash: row for trial, row in finished}
    height = 3.2 if len(study.file.grid) == 2 else 0.9 + 0.34 * len(study.variants)
    across = min(len(metrics), _PANELS_A_ROW)
    down = math.ceil(len(metrics) / across)
    figure = Figure(figsize=(1.5 + 3.4 * across, height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for number, (axis, metric) in enumerate(zip(axes.flat, metrics)):
        values = values_of(study, rows, metric, "all")
        axis.set_title(metric, fontsize=9)
        if len(study.file.grid) == 2:
            _draw_map(axis, study, values)
        else:
            _draw_dots(axis, values, study.file.baseline, with_names=number % across == 0)
    figure.savefig(to, dpi=110, metadata={"Software": None})


def _draw_dots(axis: Axes, values: Values, baseline: str, with_names: bool) -> None:
    for height, (name, by_seed) in enumerate(values.items()):
        if not by_seed:
            continue
        estimate = interval(list(by_seed.values()))
        colour = "#b5651d" if name == baseline else "#1f4e79"
        axis.plot(list(by_seed.values()), [height] * len(by_seed), "o", color=colour, alpha=0.3, markersize=4)
        if estimate.n > 1:
            axis.plot([estimate.low, estimate.high], [height, height], color=colour, linewidth=1.6)
        axis.plot([estimate.mean], [height], "D", color=colour, markersize=5)
        if name == baseline:
            axis.axvline(estimate.mean, color=colour, linewidth=0.7, linestyle=":")
    axis.set_yticks(range(len(values)), list(values) if with_names else [""] * len(values), fontsize=8)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlabel("percent", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.25, axis="x")


def _draw_map(axis: Axes, study: Study, values: Values) -> None:
    (down, rows), (across, columns) = study.file.grid.items()
    means = np.full((len(rows), len(columns)), np.nan)
    for by_seed, place in zip(values.values(), np.ndindex(means.shape)):  # variants are in the grid's order
        if by_seed:
            means[place] = interval(list(by_seed.values())).mean
    axis.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    for place, mean in np.ndenumerate(means):
        if not math.isnan(mean):
            colour = "white" if mean < (np.nanmin(means) + np.nanmax(means)) / 2 else "black"
            axis.text(place[1], place[0], f"{mean:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_ylabel(down, fontsize=8)
    axis.set_xlabel(across, fontsize=8)
