"""Measure how a step's time grows with batch size and image size."""

from dataclasses import replace
from pathlib import Path

import torch

from mamo.benchmark.cases import Case, build_case
from mamo.benchmark.timing import Rounds, seconds
from mamo.training.precision import Precision

ROUNDS = 3


def measure_growth(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure seconds per sample at half and twice the batch size and at twice the image side."""
    grown = {
        f"batch_{case.batch_size // 2}": replace(case, batch_size=max(2, case.batch_size // 2)),
        f"batch_{case.batch_size}": case,
        f"batch_{2 * case.batch_size}": replace(case, batch_size=2 * case.batch_size),
        f"image_{2 * case.image_size_px}_px": replace(case, image_size_px=2 * case.image_size_px),
    }
    found: dict[str, float] = {}
    for name, other in grown.items():
        _, loop, batch = build_case(other, folder, device, precision)
        rounds = Rounds()
        for step in range(ROUNDS + 1):
            sample_s = seconds(lambda: loop.step(batch, step), device) / len(batch)  # noqa: B023 (called at once)
            if step > 0:
                rounds.add(sample_s=sample_s)
        found |= rounds.summary(f"growth/{case.preset}/{name}")
    return found
