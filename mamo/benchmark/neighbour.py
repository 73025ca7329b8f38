"""Measure how much of its speed a step keeps beside one other busy program."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mamo.benchmark.cases import Case, build_case
from mamo.benchmark.timing import Rounds, seconds
from mamo.training.precision import Precision

START_S = 0.5
"""Time for the other program to start."""


def measure_neighbour(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure seconds per step alone and beside a program that keeps one core busy, in turns, and their ratio."""
    _, loop, batch = build_case(case, folder, device, precision)
    loop.step(batch, 0)
    rounds = Rounds()
    for _ in range(case.rounds):
        alone_s = seconds(lambda: loop.step(batch, 1), device)
        with busy_program():
            beside_s = seconds(lambda: loop.step(batch, 1), device)
        rounds.add(alone_s=alone_s, beside_s=beside_s, share_of_lone_speed=alone_s / beside_s)
    return rounds.summary(f"neighbour/{case.preset}")


@contextmanager
def busy_program() -> Iterator[None]:
    """Keep one core busy within the context."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(START_S)
        yield
    finally:
        program.kill()
        program.wait()
