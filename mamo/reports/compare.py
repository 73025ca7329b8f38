"""Whether a run goes as a reference run went: the first step and metric outside of its band, and the usual cause.

The band of a metric at a step, of logarithms, from one reference run or several seeds of it:
- both sides are smoothed by a running mean, whose own noise is known from the differences of neighbouring steps;
- a seed may learn faster or slower: the band at step s spans what the reference shows from s / PACE to s * PACE;
- seeds differ in level. What several reference seeds show is blended with `SEED_SPREAD`, which stands for it where
  there is one run: s^2 = (prior^2 + (R - 1) * found^2) / R, the moderated variance of Smyth (2004) with one prior
  degree of freedom. Losses whose target lies in the data (MLM, ITC, ITM) hardly differ; those whose target the network
  makes itself (MIM, MRM) and the spread of its features are a seed's own, and only a gross departure counts.
What is a setting (`learning_rate`, `weight/LOSS`) must be equal. Accuracies say what their losses say, more coarsely,
and are left out.

Legend: R reference runs, T steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamo.config.values import flatten, read_values
from mamo.training.run_dir import CONFIG, METRICS, read_evaluations, read_jsonl

Floats = NDArray[np.float64]

WINDOW = 15
"""Steps of the running mean."""
PACE = 1.15
"""How much faster or slower another seed may learn."""
SIGMAS = 3.5
"""Standard deviations on either side: thousands of steps and a dozen metrics are looked at."""
SEED_SPREAD = (
    ("loss/mlm", 0.015),
    ("loss/itc", 0.02),
    ("loss/itm", 0.03),
    ("gradient_norm", 0.15),
    ("teacher_spread/", 0.4),
    ("", 0.9),
)
"""Relative standard deviation from seed to seed, supposed before any is seen, of metrics whose name begins so."""
PATIENCE = 5
"""Consecutive steps outside before it counts."""
SMALLEST = 1e-4
"""Below this a loss or spread counts as this."""
RESULT_POINTS = 10.0
"""Percentage points that a final result may differ; a few hundred steps at another seed differ by several."""
_UNCOMPARED_SETTINGS = ("seed", "output_dir", "data.workers", "evaluation.", "training.checkpoint")
_IS_SETTING = ("learning_rate", "weight/")
_CAUSES: tuple[tuple[str, str, str], ...] = (  # (metric begins with, above or below or "", cause)
    ("learning_rate", "", "training.learning_rate, learning_rate_min, warmup_steps or total_steps is another"),
    ("weight/", "", "losses.weights is another"),
    ("teacher_spread/image", "", "the image encoder starts otherwise (model.image.weights, its initialisation), or is "
     "frozen; later on: teacher.momentum or the learning rate"),
    ("teacher_spread/text", "", "the text encoder starts otherwise (model.text.weights), or is frozen; later on: "
     "teacher.momentum or the learning rate"),
    ("teacher_spread/", "below", "the fused features are collapsing: teacher.momentum, a learning rate too high"),
    ("teacher_spread/", "above", "the fused features are not formed: a learning rate too low, a frozen encoder"),
    ("gradient_norm", "above", "a learning rate too high or no warm-up; another initialisation, unscaled pixels"),
    ("gradient_norm", "below", "a part of the network gets no gradient (a frozen encoder), or starts asleep (missing "
     "weights or another initialisation)"),
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
    """Where a metric leaves its band. `step` is None for what holds of the whole run."""

    metric: str
    step: int | None
    value: float
    low: float
    high: float

    @property
    def cause(self) -> str:
        """What usually causes it."""
        side = "above" if self.value > self.high else "below"
        if math.isnan(self.value):
            return "this loss is switched off in the run (losses.weights)"
        return next((cause for start, way, cause in _CAUSES if self.metric.startswith(start) and way in ("", side)), "")

    def line(self) -> str:
        """The departure in words."""
        where = "at the end" if self.step is None else f"at step {self.step}"
        return f"{self.metric} {where}: {self.value:.4g}, the reference's band is {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    departures: tuple[Deviation, ...]
    """The first of each metric, the earliest first."""
    notes: tuple[str, ...]
    n_steps: int
    n_references: int

    def lines(self) -> list[str]:
        """The report."""
        what = f"{self.n_steps} steps, {self.n_references} reference run(s)"
        if not self.departures:
            return [f"inside the band of the reference: {what}", *self.notes]
        first, *others = self.departures
        lines = [f"outside of the band of the reference ({what})", f"first: {first.line()}"]
        lines += [f"usual cause: {first.cause}"] if first.cause else []
        lines += ["then:", *(f"  {departure.line()}" for departure in others)] if others else []
        return [*lines, *self.notes]


def compare_runs(run: Path, reference: Path) -> Comparison:
    """Compare a run's folder with a reference's, which holds `metrics.jsonl` itself or in a subfolder for each seed.

    `results.json` and `config.yaml` are read where both sides have them; the latter only to name what differs.

    Raises:
        ValueError: a folder without metrics, a damaged file, a run and a reference without a common step.
    """
    folders = [folder for folder in (reference, *sorted(reference.glob("*"))) if (folder / METRICS).is_file()]
    if not folders:
        raise ValueError(f"{reference}: holds no {METRICS}, nor does a folder in it; name a reference folder")
    own, others = _read(run), [_read(folder) for folder in folders]
    steps = set(own).intersection(*others)
    if not steps:
        raise ValueError(f"{run} and {reference} have no step in common")
    common = sorted(steps)
    names = dict.fromkeys(name for rows in others for name in rows[common[0]] if not name.endswith("_accuracy"))
    departures = [found for name in names if (found := _departure(name, common, own, others)) is not None]
    departures.sort(key=lambda departure: departure.step or 0)
    notes = [f"only in the run: {name}" for name in own[common[0]] if name not in others[0][common[0]]]
    notes += _differing_settings(run, folders[0])
    if len(steps) < len(others[0]):
        notes.append(f"the run has {len(steps)} of the reference's {len(others[0])} steps: no more was compared")
    return Comparison((*departures, *_result_departures(run, folders)), tuple(notes), len(common), len(others))


def _read(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics. Raises ValueError naming the file."""
    path = folder / METRICS
    try:
        rows = read_jsonl(path)
        found = {row["step"]: {name: float(value) for name, value in row.items() if name != "step"} for row in rows}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; name the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no file of metrics ({error})") from None
    if not found:
        raise ValueError(f"{path}: holds no step")
    return found


def _departure(
    name: str, steps: Sequence[int], own: dict[int, dict[str, float]], others: list[dict[int, dict[str, float]]]
) -> Deviation | None:
    """The first step at which a metric of the run leaves its band, None if none."""
    missing = next((step for step in steps if name not in own[step]), None)
    references = np.array([[rows[step].get(name, np.nan) for step in steps] for rows in others])  # [R, T]
    if missing is not None or np.isnan(references).any():
        at = steps[0] if missing is None else missing
        return Deviation(name, at, float("nan"), float(references[:, 0].min()), float(references[:, 0].max()))
    values = np.array([own[step][name] for step in steps])  # [T]
    if name.startswith(_IS_SETTING):
        low = high = references[0]
        is_outside, patience = ~np.isclose(values, low, rtol=1e-4, atol=0), 1
    else:
        low, high = band(references, np.asarray(steps, dtype=float), _seed_spread(name))
        values = np.exp(running_mean(_log(values)))
        is_outside, patience = ~((low <= values) & (values <= high)), min(PATIENCE, len(steps))
    runs = np.convolve(is_outside, np.ones(patience), mode="valid") == patience
    if not runs.any():
        return None
    first = int(runs.argmax())
    return Deviation(name, steps[first], float(values[first]), float(low[first]), float(high[first]))


def band(references: Floats, steps: Floats, seed_spread: float) -> tuple[Floats, Floats]:
    """The lowest and highest smoothed value [T] that another seed may show.

    Args:
        references: [R, T], not negative.
        steps: [T], ascending.
        seed_spread: relative standard deviation from seed to seed that is supposed before any is seen.
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


def running_mean(values: Floats) -> Floats:
    """Mean of each value and the `WINDOW` - 1 before it (fewer at the start); [T]."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - WINDOW)
    means: Floats = (sums[stops] - sums[starts]) / (stops - starts)
    return means


def _step_noise(references: Floats) -> Floats:
    """Standard deviation of a step's value around its trend [T]: differences of neighbours hold it twice, no trend."""
    squares = np.square(np.diff(references, axis=1)).mean(axis=0) / 2  # [T - 1]
    if not squares.size:
        return np.zeros(references.shape[1])
    kernel = np.ones(min(4 * WINDOW, len(squares)))
    mean = np.convolve(squares, kernel, mode="same") / np.convolve(np.ones_like(squares), kernel, mode="same")
    noise: Floats = np.sqrt(np.concatenate([mean[:1], mean]))
    return noise


def _differing_settings(run: Path, reference: Path) -> list[str]:
    """Lines for the settings in which two `config.yaml` differ; none where one has no such file."""
    if not ((run / CONFIG).is_file() and (reference / CONFIG).is_file()):
        return []
    ours, theirs = flatten(read_values(run / CONFIG)), flatten(read_values(reference / CONFIG))
    keys = [key for key in {**theirs, **ours} if not key.startswith(_UNCOMPARED_SETTINGS)]
    return [
        f"config.yaml: {key} is {ours.get(key)}, in the reference {theirs.get(key)}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _result_departures(run: Path, references: Sequence[Path]) -> list[Deviation]:
    """Final results more than `RESULT_POINTS` outside of the references' where protocol and step are the same.

    `rsum` is left to the six recalls that it sums up: six small differences are none.
    """
    own = _last_results(run)
    others = [found for found in map(_last_results, references) if found and own and found[0] == own[0]]
    departures = []
    for name, value in own[1].items() if own else ():
        theirs = [metrics[name] for _, metrics in others if name in metrics]
        is_sum = name.endswith("/rsum")
        if theirs and not is_sum and not min(theirs) - RESULT_POINTS <= value <= max(theirs) + RESULT_POINTS:
            departures.append(Deviation(name, None, value, min(theirs) - RESULT_POINTS, max(theirs) + RESULT_POINTS))
    return departures


def _last_results(folder: Path) -> tuple[tuple[Any, ...], dict[str, float]] | None:
    try:
        evaluations = read_evaluations(folder)
        last = evaluations[-1] if evaluations else None
        return None if last is None else ((last["protocol"], last["step"]), last["metrics"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'results.json'}: is no file of results ({error})") from None
