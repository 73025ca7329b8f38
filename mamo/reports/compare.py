"""Compare a run with a reference run: find the first step and metric outside of its band, and the usual cause.

The band of a metric at a step, of logarithms, from one reference run or several seeds of it:

- Both sides are smoothed by a running mean, whose noise is estimated from differences of neighbouring steps.
- A seed may learn faster or slower: the band at step s covers the reference from s / PACE to s * PACE.
- Seeds differ in level. The variance over the reference seeds is blended with the prior `SEED_SPREAD`:
  s^2 = (prior^2 + (R - 1) * found^2) / R, the moderated variance of Smyth (2004) with one prior degree of freedom.
  Losses with a target from the data (MLM, ITC, ITM) hardly differ between seeds. Losses with a target from the network
  (MIM, MRM) and the spread of its features differ much, and only a gross deviation counts.

Settings (`learning_rate`, `weight/LOSS`) must be equal. Accuracies repeat their losses more coarsely and are left out.

Legend: R reference runs, T steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamo.config.values import flatten, read_values
from mamo.evaluation.protocols import current_name
from mamo.training.run_dir import CONFIG, METRICS, read_evaluations, read_jsonl

Floats = NDArray[np.float64]

WINDOW = 15
"""Steps of the running mean."""
PACE = 1.15
"""Factor by which another seed may learn faster or slower."""
SIGMAS = 3.5
"""Standard deviations on either side: thousands of steps and a dozen metrics are compared."""
SEED_SPREAD = (
    ("loss/mlm", 0.015),
    ("loss/itc", 0.02),
    ("loss/itm", 0.03),
    ("gradient_norm", 0.15),
    ("teacher_spread/", 0.4),
    ("", 0.9),
)
"""Prior of the relative standard deviation between seeds, by prefix of the metric's name."""
PATIENCE = 5
"""Consecutive steps outside of the band that count as a deviation."""
SMALLEST = 1e-4
"""Lower bound of losses and spreads before the logarithm."""
RESULT_POINTS = 10.0
"""Percentage points by which a final result may differ; two seeds of a few hundred steps differ by several."""
_UNCOMPARED_SETTINGS = ("seed", "output_dir", "data.workers", "evaluation.", "training.checkpoint")
_IS_SETTING = ("learning_rate", "weight/")
_CAUSES: tuple[tuple[str, str, str], ...] = (  # (metric begins with, above or below or "", cause)
    ("learning_rate", "", "training.learning_rate, learning_rate_min, warmup_steps or total_steps differs"),
    ("weight/", "", "losses.weights differs"),
    ("teacher_spread/image", "", "the image encoder starts from other weights (model.image.weights, initialisation) or "
     "is frozen; at later steps: teacher.momentum or the learning rate"),
    ("teacher_spread/text", "", "the text encoder starts from other weights (model.text.weights) or is frozen; at "
     "later steps: teacher.momentum or the learning rate"),
    ("teacher_spread/", "below", "the fused features are collapsing: teacher.momentum, a learning rate too high"),
    ("teacher_spread/", "above", "the fused features are not formed: a learning rate too low, a frozen encoder"),
    ("gradient_norm", "above", "a learning rate too high or no warm-up; another initialisation, unscaled pixels"),
    ("gradient_norm", "below", "a part of the network gets no gradient (a frozen encoder), or starts with tiny "
     "gradients (missing weights or another initialisation)"),
    ("loss/mlm", "below", "masked words leak, or fewer are masked (masking.text_ratio); a higher learning rate"),
    ("loss/mim", "below", "masked patches leak, or fewer are masked (masking.image_ratio); a frozen image encoder, "
     "whose features are easy to predict"),
    ("loss/mrm", "below", "the teacher's features collapse or the encoders are frozen; a higher learning rate"),
    ("loss/", "above", "learning is slower: a learning rate too low or far too high, a frozen encoder, an encoder "
     "without its initial weights, pixels not normalised"),
    ("loss/", "below", "learning is faster: a higher learning rate, better initial weights, easier or repeated data"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Deviation:
    """A metric that leaves its band. `step` is None for a result of the whole run."""

    metric: str
    step: int | None
    value: float
    low: float
    high: float

    @property
    def cause(self) -> str:
        """Return the usual cause."""
        side = "above" if self.value > self.high else "below"
        if math.isnan(self.value):
            return "this loss is switched off in the run (losses.weights)"
        return next((cause for start, way, cause in _CAUSES if self.metric.startswith(start) and way in ("", side)), "")

    def line(self) -> str:
        """Format the deviation in words."""
        where = "at the end" if self.step is None else f"at step {self.step}"
        return f"{self.metric} {where}: {self.value:.4g}, the reference's band is {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of a comparison."""

    deviations: tuple[Deviation, ...]
    """The first deviation of each metric, in order of steps."""
    notes: tuple[str, ...]
    n_steps: int
    n_references: int

    def lines(self) -> list[str]:
        """Format the report."""
        what = f"{self.n_steps} steps, {self.n_references} reference run(s)"
        if not self.deviations:
            return [f"inside the band of the reference: {what}", *self.notes]
        first, *others = self.deviations
        lines = [f"outside of the band of the reference ({what})", f"first: {first.line()}"]
        lines += [f"usual cause: {first.cause}"] if first.cause else []
        lines += ["then:", *(f"  {deviation.line()}" for deviation in others)] if others else []
        return [*lines, *self.notes]


def compare_runs(run: Path, reference: Path) -> Comparison:
    """Compare a run with a reference, whose folder has `metrics.jsonl` itself or in one subfolder per seed.

    `results.json` and `config.yaml` are read where both sides have them; the latter only to list what differs.

    Raises:
        ValueError: a folder without metrics, a damaged file, or no step in common.
    """
    folders = seed_folders(reference, run)
    if not folders:
        raise ValueError(
            f"{reference}: no {METRICS} here or one level below, except the run itself; give a reference run"
        )
    own, others = read_metrics(run), [read_metrics(folder) for folder in folders]
    steps = set(own).intersection(*others)
    if not steps:
        raise ValueError(f"{run} and {reference} have no step in common")
    common = sorted(steps)
    names = dict.fromkeys(name for rows in others for name in rows[common[0]] if is_compared(name))
    deviations = [found for name in names if (found := _deviation(name, common, own, others)) is not None]
    deviations.sort(key=lambda deviation: deviation.step or 0)
    notes = [f"only in the run: {name}" for name in own[common[0]] if name not in others[0][common[0]]]
    notes += _differing_settings(run, folders[0])
    if len(steps) < len(others[0]):
        notes.append(f"the run has {len(steps)} of the reference's {len(others[0])} steps: only these were compared")
    return Comparison((*deviations, *_result_deviations(run, folders)), tuple(notes), len(common), len(others))


def seed_folders(reference: Path, run: Path) -> list[Path]:
    """List the runs of a reference, its folder and its subfolders with `metrics.jsonl`, without the compared run."""
    folders = [folder for folder in (reference, *sorted(reference.glob("*"))) if (folder / METRICS).is_file()]
    return [folder for folder in folders if folder.resolve() != run.resolve()]


def is_compared(name: str) -> bool:
    """Return whether a metric has a band; accuracies have none."""
    return not name.endswith("_accuracy")


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Read step -> metrics of a run. Raises ValueError naming a missing or damaged file."""
    path = folder / METRICS
    try:
        rows = read_jsonl(path)
        found = {row["step"]: {name: float(value) for name, value in row.items() if name != "step"} for row in rows}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; give the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a metrics file ({error})") from None
    if not found:
        raise ValueError(f"{path}: no steps in this file")
    return found


def _deviation(
    name: str, steps: Sequence[int], own: dict[int, dict[str, float]], others: list[dict[int, dict[str, float]]]
) -> Deviation | None:
    """Return the first step at which a metric of the run leaves its band, None if it does not."""
    missing = next((step for step in steps if name not in own[step]), None)
    references = np.array([[rows[step].get(name, np.nan) for step in steps] for rows in others])  # [R, T]
    if missing is not None or np.isnan(references).any():
        at = steps[0] if missing is None else missing
        return Deviation(name, at, float("nan"), float(references[:, 0].min()), float(references[:, 0].max()))
    values = smoothed(name, np.array([own[step][name] for step in steps]))  # [T]
    low, high = metric_band(name, references, np.asarray(steps, dtype=float))
    if name.startswith(_IS_SETTING):
        is_outside, patience = ~np.isclose(values, low, rtol=1e-4, atol=0), 1
    else:
        is_outside, patience = ~((low <= values) & (values <= high)), min(PATIENCE, len(steps))
    runs = np.convolve(is_outside, np.ones(patience), mode="valid") == patience
    if not runs.any():
        return None
    first = int(runs.argmax())
    return Deviation(name, steps[first], float(values[first]), float(low[first]), float(high[first]))


def smoothed(name: str, values: Floats) -> Floats:
    """Smooth the values [T] of a metric as they are compared with its band; settings are not smoothed."""
    means: Floats = values if name.startswith(_IS_SETTING) else np.exp(running_mean(_log(values)))
    return means


def metric_band(name: str, references: Floats, steps: Floats) -> tuple[Floats, Floats]:
    """Compute the band of a metric by its name: `band`, of a setting the reference's own values.

    Args:
        name: the metric.
        references: its values [R, T].
        steps: [T], ascending.
    """
    if name.startswith(_IS_SETTING):
        return references[0], references[0]
    return band(references, steps, _seed_spread(name))


def band(references: Floats, steps: Floats, seed_spread: float) -> tuple[Floats, Floats]:
    """Compute the lowest and highest smoothed value [T] that another seed may have.

    Args:
        references: [R, T], not negative.
        steps: [T], ascending.
        seed_spread: prior of the relative standard deviation between seeds.
    """
    logs = _log(references)
    n_runs = len(logs)
    smooth = np.stack([running_mean(row) for row in logs])  # [R, T]
    found = smooth.var(axis=0, ddof=1) if n_runs > 1 else np.zeros(len(steps))  # [T]
    between = (seed_spread**2 + (n_runs - 1) * found) / n_runs
    n_averaged = np.minimum(np.arange(1, len(steps) + 1), WINDOW)
    variance = between * (1 + 1 / n_runs) + _step_noise(logs) ** 2 / n_averaged * (1 + 1 / n_runs)
    half = SIGMAS * np.sqrt(variance)
    middle = smooth.mean(axis=0)
    lowest, highest = middle - half, middle + half
    first = np.searchsorted(steps, steps / PACE, side="left")
    last = np.searchsorted(steps, steps * PACE, side="right")
    low = np.array([lowest[a:b].min() for a, b in zip(first, last)])
    high = np.array([highest[a:b].max() for a, b in zip(first, last)])
    return np.exp(low), np.exp(high)


def _seed_spread(name: str) -> float:
    return next(spread for start, spread in SEED_SPREAD if name.startswith(start))


def _log(values: Floats) -> Floats:
    logs: Floats = np.log(np.maximum(values, SMALLEST))
    return logs


def running_mean(values: Floats, window: int = WINDOW) -> Floats:
    """Average each value with the `window` - 1 before it (fewer at the start); [T]."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - window)
    means: Floats = (sums[stops] - sums[starts]) / (stops - starts)
    return means


def _step_noise(references: Floats) -> Floats:
    """Estimate the standard deviation of a step's value around its trend [T] from differences of neighbours."""
    squares = np.square(np.diff(references, axis=1)).mean(axis=0) / 2  # [T - 1]; a difference has twice the variance
    if not squares.size:
        return np.zeros(references.shape[1])
    kernel = np.ones(min(4 * WINDOW, len(squares)))
    mean = np.convolve(squares, kernel, mode="same") / np.convolve(np.ones_like(squares), kernel, mode="same")
    noise: Floats = np.sqrt(np.concatenate([mean[:1], mean]))
    return noise


def _differing_settings(run: Path, reference: Path) -> list[str]:
    """List the settings in which two `config.yaml` differ; none where one side has no such file."""
    if not ((run / CONFIG).is_file() and (reference / CONFIG).is_file()):
        return []
    ours, theirs = flatten(read_values(run / CONFIG)), flatten(read_values(reference / CONFIG))
    keys = [key for key in {**theirs, **ours} if not key.startswith(_UNCOMPARED_SETTINGS)]
    return [
        f"config.yaml: {key} is {ours.get(key)}, in the reference {theirs.get(key)}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _result_deviations(run: Path, references: Sequence[Path]) -> list[Deviation]:
    """Find final results more than `RESULT_POINTS` outside of the references' results of the same protocol and step.

    `rsum` is left out: it is the sum of six recalls, which are compared themselves.
    """
    own = _last_results(run)
    others = [found for found in map(_last_results, references) if found and own and found[0] == own[0]]
    deviations = []
    for name, value in own[1].items() if own else ():
        theirs = [metrics[name] for _, metrics in others if name in metrics]
        is_sum = name.endswith("/rsum")
        if theirs and not is_sum and not min(theirs) - RESULT_POINTS <= value <= max(theirs) + RESULT_POINTS:
            deviations.append(Deviation(name, None, value, min(theirs) - RESULT_POINTS, max(theirs) + RESULT_POINTS))
    return deviations


def _last_results(folder: Path) -> tuple[tuple[object, ...], dict[str, float]] | None:
    try:
        evaluations = read_evaluations(folder)
        last = evaluations[-1] if evaluations else None
        return None if last is None else ((current_name(last), last["step"]), last["metrics"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'results.json'} is not a valid results.json ({error})") from None
