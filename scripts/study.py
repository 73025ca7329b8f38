"""Run a study and report it: `python scripts/study.py --config configs/studies/NAME.yaml [--jobs N] [key=value ...]`.

Finished cells are skipped, begun ones go on, and the tables are written after each. Settings go over the study's base,
`finetune.key=value` over its fine-tuning. `--reproduced` compares all finished cells with what the papers report.
"""

import argparse
import signal
from pathlib import Path

from mamo.cli import run
from mamo.study.spec import read_study

STUDIES = Path("configs/studies")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--config", type=Path, help="the study's file")
    asked.add_argument("--reproduced", action="store_true", help="print the papers' differences beside all studies'")
    parser.add_argument("--seeds", choices=["explore", "confirm", "all"], default="explore", help="which of its seeds")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; 0: run none, report what has finished")
    parser.add_argument("--print", action="store_true", help="print the commands of the cells to run, for a cluster")
    parser.add_argument("--measure", action="store_true", help="print what a step of each variant costs; run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="where cells run")
    parser.add_argument("--results", type=Path, help="finished cells and tables (default: results beside the file)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped study stops its cells
    if arguments.reproduced:
        from mamo.study.published import PUBLISHED, published_table  # here, so that a mistake is answered at once

        print(published_table(STUDIES / PUBLISHED, arguments.results or STUDIES / "results"), end="")
        return
    study = read_study(arguments.config, arguments.settings)
    results = arguments.results or arguments.config.parent / "results"
    scripts = Path(__file__).parent
    if arguments.measure:
        from mamo.study.cost import cost_lines  # here, so that a mistake in the file is answered at once

        print("\n".join(cost_lines(study)))
        return
    from mamo.study.execute import run_study, shell_lines

    if arguments.print:
        print("\n".join(shell_lines(study, arguments.seeds, arguments.runs, results, scripts)))
        return
    for file in run_study(study, arguments.seeds, arguments.jobs, arguments.runs, results, scripts):
        print(file)


if __name__ == "__main__":
    run(main)
