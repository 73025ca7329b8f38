"""Compare a run's curves with a reference's: `mamo compare RUN REFERENCE`.

Prints the first step and metric outside the band of the reference, and the usual cause. Exit code 0: inside; 1:
outside; 2: a file cannot be read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Read the arguments, compare, print; return 1 where the run is outside the band."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, finished or not")
    parser.add_argument(
        "reference", type=Path, help="a run folder such as configs/reference/scenes, or one that holds several seeds"
    )
    arguments = parser.parse_args(argv)
    announce("compare", arguments.run)
    from mamo.reports.compare import compare_runs  # here, so that --help imports no torch

    verdict = compare_runs(arguments.run, arguments.reference)
    print("\n".join(verdict.lines()))
    return 1 if verdict.deviations else 0
