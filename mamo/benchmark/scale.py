"""Predict the time of a run on many devices from the measured time on one.

With plain data parallelism over N devices and a global batch of B pairs, a step takes

    T(N) = max(s B / N, o)  +  max(0, r - h max(s B / N, o))  +  g

    s       measured seconds per pair on one device
    o       the host's seconds to launch the operations of a step on a GPU, for a small local batch B / N
    r       the ring all-reduce of the gradients, 2 (N - 1) / N * 4 bytes * parameters / bandwidth + 2 (N - 1) latency
    h       the share of the step that overlaps the all-reduce: the last micro-batch's backward pass after its first
            bucket; 0.5 over the number of micro-batches
    g       the features and ids of the global batch, (N - 1) / N * B * (2 * 4 * width + 2 * 8) bytes / bandwidth

where the bandwidth is that of the slowest link in the ring: within a machine, or between machines. Stragglers and
evaluation are not included.
"""

import math
from dataclasses import dataclass

OVERLAP = 0.5
LAUNCHES = 2_700
"""Operations of a step of `base` with the five losses, views apart: 2,716 were counted on a CPU."""
LAUNCH_S = 5e-6
"""Assumed: the host's time of a launch without CUDA graphs."""
GRADIENT_BYTES, FEATURE_BYTES, ID_BYTES = 4, 4, 8


@dataclass(frozen=True)
class Links:
    """Links between devices; bandwidth is one direction of one device, as a ring all-reduce reaches it."""

    devices_a_machine: int = 8
    within_bytes_per_s: float = 300e9
    """NVLink 4; its data sheet lists 450e9."""
    between_bytes_per_s: float = 40e9
    """One 400 Gbit/s adapter per device, nominally 50e9."""
    latency_s: float = 10e-6


@dataclass(frozen=True)
class Recipe:
    """Size of a training run."""

    pairs: int
    batch_size_global: int
    parameters: int
    feature_width: int = 256
    micro_batches: int = 1


PAPER = Recipe(pairs=764_000 * 512, batch_size_global=512, parameters=200_089_661)
"""`configs/pretrain/paper.yaml`: 40 epochs of 9.78 million captions. If an epoch is each of the 4.02 million images
once, the hours are 0.41 of these."""


def step_seconds(recipe: Recipe, pair_s: float, n_devices: int, links: Links, launch_s: float = 0.0) -> float:
    """Compute T(N) for `pair_s` measured seconds per pair on one device, and `launch_s` seconds of host a launch."""
    n, batch = n_devices, recipe.batch_size_global
    compute_s = max(pair_s * batch / n, LAUNCHES * recipe.micro_batches * launch_s)
    if n == 1:
        return compute_s
    bandwidth = links.within_bytes_per_s if n <= links.devices_a_machine else links.between_bytes_per_s
    around = (n - 1) / n
    reduce_s = 2 * around * GRADIENT_BYTES * recipe.parameters / bandwidth + 2 * (n - 1) * links.latency_s
    row_bytes = 2 * FEATURE_BYTES * recipe.feature_width + 2 * ID_BYTES
    gather_s = around * batch * row_bytes / bandwidth + (n - 1) * links.latency_s
    return compute_s + max(0.0, reduce_s - OVERLAP / recipe.micro_batches * compute_s) + gather_s


def run_hours(recipe: Recipe, pair_s: float, n_devices: int, links: Links, launch_s: float = 0.0) -> float:
    """Compute the hours of the whole run."""
    steps = math.ceil(recipe.pairs / recipe.batch_size_global)
    return steps * step_seconds(recipe, pair_s, n_devices, links, launch_s) / 3600


def scale_plan(pair_s: float, device: str, recipe: Recipe = PAPER, links: Links | None = None) -> dict[str, float]:
    """Predict hours and step seconds of the paper's run on 1, 8 and 64 devices of the measured kind (`device`).

    On a CPU the predictions for 8 and 64 devices cover only the arithmetic: its links are not these.
    """
    links = links or Links()
    found: dict[str, float] = {}
    launch_s = LAUNCH_S if device == "cuda" else 0.0
    for n in (1, 8, 64):
        found[f"scale/{device}_{n}/step_s"] = step_seconds(recipe, pair_s, n, links, launch_s)
        found[f"scale/{device}_{n}/hours"] = run_hours(recipe, pair_s, n, links, launch_s)
        found[f"scale/{device}_{n}/efficiency"] = (
            pair_s * recipe.batch_size_global / (n * found[f"scale/{device}_{n}/step_s"])
        )
    return found
