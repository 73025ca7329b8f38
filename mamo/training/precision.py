"""Choosing device and precision once, at the start of a run; the choice is written into the resolved config."""

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch

logger = logging.getLogger(__name__)

TIMED_STEPS = 3


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises `ValueError` where CUDA is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device: cuda was asked for, but this machine offers none; use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def choose_precision(run_step: Callable[[Literal["fp32", "bf16"]], None]) -> Literal["fp32", "bf16"]:
    """Time `run_step` (forward and backward, no state moved) in both precisions; the faster one wins.

    bf16 matrix products are several times as fast as fp32 on some CPUs and emulated, slower, on others, so this is
    measured rather than assumed.
    """
    seconds: dict[Literal["fp32", "bf16"], float] = {}
    for precision in ("fp32", "bf16"):
        run_step(precision)  # warm-up
        durations = []
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            run_step(precision)
            durations.append(time.perf_counter() - started)
        seconds[precision] = min(durations)
    chosen = min(seconds, key=lambda name: seconds[name])
    logger.info("precision: %s (a step takes fp32 %.3f s, bf16 %.3f s)", chosen, seconds["fp32"], seconds["bf16"])
    return chosen
