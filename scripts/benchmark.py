"""Measure speed and memory on this machine: `python scripts/benchmark.py --preset tiny --json benchmark.json`."""

import argparse
import os
from pathlib import Path

from mamo.cli import run


def main() -> None:
    """Parse the command line, measure, print the table."""
    import torch  # here, so that --help and a mistake are answered at once

    from mamo.benchmark.cases import CASES, case_for
    from mamo.benchmark.suite import LOADING, SECTIONS, machine, run_benchmark, table, write_json
    from mamo.training.precision import choose_device

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=list(CASES), action="append", help="default: all")
    parser.add_argument("--only", choices=[LOADING, *SECTIONS], action="append", help="default: all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a CPU")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    cases = [case_for(preset, device) for preset in arguments.preset or CASES]
    found = machine(device)
    for part in run_benchmark(cases, device, arguments.only or ()):
        found |= part
        if arguments.json is not None:
            write_json(found, arguments.json)  # after each section: one that is cut off keeps those before
    print("\n".join(table(found)))


if __name__ == "__main__":
    run(main)
