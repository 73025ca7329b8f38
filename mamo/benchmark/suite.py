"""Run all sections of the benchmark over the presets; the result is one flat table of numbers."""

import json
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mamo.benchmark.cases import Case
from mamo.benchmark.growth import measure_growth
from mamo.benchmark.loading import measure_loading, measure_waiting
from mamo.benchmark.memory import measure_checkpoint, measure_memory
from mamo.benchmark.neighbour import measure_neighbour
from mamo.benchmark.processes import measure_processes
from mamo.benchmark.reranking import measure_galleries, measure_gallery_memory, measure_reranking
from mamo.benchmark.scale import scale_plan
from mamo.benchmark.sections import LOADING
from mamo.benchmark.shortcuts import measure_shortcuts
from mamo.benchmark.step import measure_passes, measure_step
from mamo.config.values import Values
from mamo.training.precision import Precision, product_seconds

logger = logging.getLogger(__name__)


Section = Callable[[Case, Path, torch.device, Precision], dict[str, float]]


def _step(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    found = measure_step(case, folder, device, precision)
    if case.preset == "base":
        found |= scale_plan(1 / found["step/base/samples_per_s"], device.type)
    return found


def _growth(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    found = measure_growth(case, folder, device, precision) | measure_galleries(case, device)
    return found | (measure_gallery_memory(case, folder, device, precision) if device.type == "cuda" else {})


def _waiting(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    return measure_waiting(case, folder, device, precision, workers=16 if device.type == "cuda" else 1)


SECTIONS: dict[str, Section] = {
    "step": _step,
    "passes": measure_passes,
    "memory": measure_memory,
    "waiting": _waiting,
    "growth": _growth,
    "processes": measure_processes,
    "reranking": measure_reranking,
    "checkpoint": measure_checkpoint,
    "shortcuts": measure_shortcuts,
    "neighbour": measure_neighbour,
}


def run_benchmark(
    cases: Sequence[Case], device: torch.device, only: Sequence[str] = (), loading_images: int = 64
) -> Iterator[dict[str, float]]:
    """Measure the sections `only` (default: all) for each case; yield each section's numbers when it is done.

    Keys are `SECTION/PRESET/NAME` for medians and `..._spread` for the interquartile range as a share of the median.
    """
    names = list(only) or [LOADING, *SECTIONS]
    with tempfile.TemporaryDirectory() as scratch:
        if LOADING in names:
            logger.info("loading")
            yield measure_loading(Path(scratch), 5, loading_images)
        sections = [name for name in names if name != LOADING]
        precision = faster_precision(device) if sections else "fp32"
        for case in cases:
            for name in sections:
                logger.info("%s/%s", name, case.preset)
                yield SECTIONS[name](case, Path(scratch), device, precision)


def faster_precision(device: torch.device) -> Precision:
    """Return the precision with the faster square product, for all sections other than `step`.

    The product is small: where bf16 is emulated, a large one takes a minute.
    """
    if device.type == "cuda":
        return "bf16"
    spent = product_seconds()
    return min(spent, key=lambda name: spent[name])


def machine(device: torch.device) -> Values:
    """Describe the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "machine/device": name,
        "machine/threads": torch.get_num_threads(),
        "machine/torch": torch.__version__,
        "machine/cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def table(found: Values) -> Iterator[str]:
    """Yield the lines of a Markdown table: key, median, spread."""
    yield "| key | median | spread |"
    yield "|---|---|---|"
    for key, value in found.items():
        if not key.endswith("_spread"):
            spread = found.get(f"{key}_spread")
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield f"| `{key}` | {shown} | {'' if spread is None else f'{100 * spread:.0f} %'} |"


def write_json(found: Values, file: Path) -> None:
    """Write all numbers as one flat JSON object."""
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
