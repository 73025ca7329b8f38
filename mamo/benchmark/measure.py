"""Time, the rate of matrix products, and the medians of both.

Other work on the machine slows everything at once: whatever is compared is measured in the same round, the ratio is
taken within the round, and the median over the rounds is reported with its spread.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 2048
"""Side of the square product that stands for what a machine can do."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall seconds of one call of `work`, the mean of `repeats` calls in a row, until the device has finished."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def square_rate(device: torch.device, precision: Precision, side: int = SIDE) -> float:
    """Operations a second of a `side` by `side` product (a multiplication and an addition count as two)."""
    left = torch.rand(side, side, device=device).to(DTYPES[precision])
    out = left @ left  # warms up
    # some milliseconds a measurement, so that neither the clock nor the start of a GPU kernel matters
    repeats = min(1000, max(3, round(20e9 / side**3))) if device.type == "cpu" else 50
    return 2 * side**3 / seconds(lambda: torch.mm(left, left, out=out), device, repeats)


class Rounds:
    """Values by key, one a round; `summary` gives their medians and spreads."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, **values: float) -> None:
        """Keep one round's values."""
        for key, value in values.items():
            self.values[key].append(value)

    def summary(self, prefix: str) -> dict[str, float]:
        """`PREFIX/key` the median and `PREFIX/key_spread` the range between quartiles as a share of it."""
        found = {}
        for key, values in self.values.items():
            found[f"{prefix}/{key}"] = middle = statistics.median(values)
            if len(values) > 1 and middle:
                low, _, high = statistics.quantiles(values, n=4, method="inclusive")
                found[f"{prefix}/{key}_spread"] = (high - low) / abs(middle)
        return found
