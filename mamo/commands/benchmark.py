"""Measure speed and memory on this machine: `mamo benchmark --preset tiny --json benchmark.json`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mamo.benchmark.sections import LOADING, SectionName
from mamo.commands.shared import announce, positive
from mamo.config.presets import PRESETS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), action="append", help="default: all")
    parser.add_argument("--only", choices=[LOADING, *get_args(SectionName)], action="append", help="default: all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="threads of the CPU")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    announce("benchmark", ", ".join(arguments.preset or ["all presets"]))
    import torch  # here, so that --help imports no torch

    from mamo.benchmark.cases import CASES, case_for
    from mamo.benchmark.suite import machine, run_benchmark, table, write_json
    from mamo.training.precision import choose_device

    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    cases = [case_for(preset, device) for preset in arguments.preset or CASES]
    found = machine(device)
    for part in run_benchmark(cases, device, arguments.only or ()):
        found |= part
        if arguments.json is not None:
            write_json(found, arguments.json)  # after each section, so that an interrupted run keeps the earlier ones
    print("\n".join(table(found)))
