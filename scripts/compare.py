"""Compare a run's curves with a reference's: `python scripts/compare.py RUN REFERENCE`.

Prints the first step and metric outside of the reference's band and what usually causes it. Exit code 0: inside; 1:
outside; 2: something cannot be read.
"""

import argparse
import sys
from pathlib import Path

from mamo.cli import run
from mamo.reports.compare import compare_runs


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, finished or not")
    parser.add_argument(
        "reference", type=Path, help="a folder such as configs/reference/scenes, or one of several seeds"
    )
    arguments = parser.parse_args()
    verdict = compare_runs(arguments.run, arguments.reference)
    print("\n".join(verdict.lines()))
    sys.exit(1 if verdict.departures else 0)


if __name__ == "__main__":
    run(main)
