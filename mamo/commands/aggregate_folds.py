"""Aggregate cross-validation runs: `mamo aggregate-folds runs/nlvr/fold-0 ... --to runs/nlvr/results.json`.

Each run held out one fold. Each statement is scored by the run that did not train on its directory. A fine-tuned run
(`task: reasoning`) predicts true where the logit is positive. For ITM scores of pre-training, the threshold of a
directory is fitted on the other directories. Retrieval metrics and consistency are means over runs, whose galleries
differ.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, aggregate, write and print."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one per fold")
    parser.add_argument("--to", type=Path, required=True, help="the results file to write")
    arguments = parser.parse_args(argv)
    from mamo.reports.folds import aggregate_folds  # here, so that --help imports no torch
    from mamo.training.run_dir import atomic_write_text

    entry = aggregate_folds(arguments.runs)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.to, json.dumps({"evaluations": [entry]}, indent=1) + "\n")
    for name, value in entry["metrics"].items():
        print(f"{name:28} {value:6.1f}")
