"""Run a study and report it: `mamo study --config losses [--jobs N] [section.key=value ...]`.

`--config` takes a path, or the name of a shipped study of `configs/studies`. Finished trials are skipped, interrupted
ones are resumed, and the tables are written after each. Settings override the study's base config,
`finetune.key=value` its fine-tuning. `--reproduced` compares all finished trials with the numbers of the papers.
"""

import argparse
import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from mamo.commands.shared import announce
from mamo.config.shipped import config_folder, find_config, is_packaged
from mamo.training.preemption import Preempted, is_heeded

RESULTS = "results"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments; run, print or report the study."""
    arguments = make_parser(prog).parse_intermixed_args(argv)
    if arguments.reproduced:
        from mamo.study.published import PUBLISHED, published_table  # here, so that --help imports no torch
        from mamo.study.results import latest_results

        studies = config_folder("studies")
        print(published_table(studies / PUBLISHED, arguments.results or latest_results(studies / RESULTS)), end="")
        return
    file = find_config(arguments.config, "studies")
    announce("study", file)
    from mamo.study.spec import read_study

    study = read_study(file, arguments.settings)
    folder = arguments.runs if is_packaged(file) else file.parent  # an installed package may be read-only
    results = arguments.results or folder / RESULTS
    if arguments.measure:
        from mamo.study.cost import cost_lines  # here, so that a mistake in the file is reported at once

        print("\n".join(cost_lines(study)))
        return
    from mamo.study.execute import run_study, shell_lines

    if arguments.print:
        print("\n".join(shell_lines(study, arguments.seeds, arguments.runs, results)))
        return
    with _stops_on_signals():
        files = run_study(study, arguments.seeds, arguments.jobs, arguments.runs, results)
    print("\n".join(map(str, files)))


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--config", metavar="FILE_OR_NAME", help="the file of the study")
    mode.add_argument("--reproduced", action="store_true", help="compare the papers with all studies")
    parser.add_argument("--seeds", choices=["explore", "confirm", "all"], default="explore", help="the set of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; 0: run none, report those that finished")
    parser.add_argument("--print", action="store_true", help="print the commands of the trials to run, for a cluster")
    parser.add_argument("--measure", action="store_true", help="print the cost of a step of each variant; run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder of the trials' runs")
    parser.add_argument("--results", type=Path, help="finished trials and tables (default: `results` next to the file)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    return parser


@contextlib.contextmanager
def _stops_on_signals() -> Iterator[None]:
    """Leave by an exception on SIGTERM and SIGHUP, which stops the running trials."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("terminated; run the same command again to continue", number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP) if is_heeded(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
