"""Measure time and the rate of matrix products; report medians and spreads over rounds.

Other load on the machine slows everything at once. Values that are compared are therefore measured in the same round,
the ratio is taken within the round, and the median over the rounds is reported with its spread.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from mamo.training.precision import DTYPES, Precision

SIDE = 2048
"""Side of the square matrix product that measures the machine's rate."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Measure wall seconds of one call of `work`, averaged over `repeats` calls, until the device has finished."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def square_rate(device: torch.device, precision: Precision, side: int = SIDE) -> float:
    """Measure operations per second of a `side` by `side` product; a multiplication and an addition count as two."""
    left = torch.rand(side, side, device=device).to(DTYPES[precision])
    out = left @ left  # warm-up
    # a measurement takes some milliseconds, so that clock resolution and kernel launches do not matter
    repeats = min(1000, max(3, round(20e9 / side**3))) if device.type == "cpu" else 50
    return 2 * side**3 / seconds(lambda: torch.mm(left, left, out=out), device, repeats)


class Rounds:
    """Values by key, one per round; `summary` returns their medians and spreads."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, **values: float) -> None:
        """Add one round's values."""
        for key, value in values.items():
            self.values[key].append(value)

    def summary(self, prefix: str) -> dict[str, float]:
        """Return `PREFIX/key` (median) and `PREFIX/key_spread` (interquartile range as a share of the median)."""
        found = {}
        for key, values in self.values.items():
            found[f"{prefix}/{key}"] = middle = statistics.median(values)
            if len(values) > 1 and middle:
                low, _, high = statistics.quantiles(values, n=4, method="inclusive")
                found[f"{prefix}/{key}_spread"] = (high - low) / abs(middle)
        return found
