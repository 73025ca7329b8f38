"""Lay the curves of runs over each other: `mamo plot RUN RUN ... [--metric NAME ...]`.

Prints a table of the keys in which the runs differ, of their last losses, and of their last evaluations.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, draw, print the table."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, finished or not")
    parser.add_argument("--metric", action="append", default=[], help="name or beginning, such as loss/; repeatable")
    parser.add_argument("--to", type=Path, default=Path("curves.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    arguments = parser.parse_args(argv)
    if arguments.to.exists() and not arguments.overwrite:
        raise ValueError(f"--to: {arguments.to}: exists; choose another file, or replace it with --overwrite")
    announce("plot", arguments.to)
    from mamo.reports.overlay import draw_runs, last_numbers, read_runs  # here, so that --help imports no torch

    runs = read_runs(arguments.runs)
    draw_runs(runs, arguments.metric, arguments.to)
    print("\n".join([*last_numbers(arguments.runs, runs, arguments.metric), "", str(arguments.to)]))
