"""Pool runs that each held out one fold: `python scripts/pool.py runs/nlvr/fold-0 ... --to runs/nlvr/results.json`.

Each statement is scored by the run that did not train on its directory. A run fine-tuned to judge (`task: reasoning`)
calls true what has a positive logit; for the ITM scores of pre-training the threshold of a directory is the one that
fits the other directories best. Retrieval figures and consistency are means over the runs, whose galleries differ.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mamo.cli import run
from mamo.evaluation.metrics.statements import StatementRecord, read_scores, statement_metrics, truth_metrics
from mamo.training.run_dir import STATEMENT_SCORES, atomic_write_text, read_evaluations


def pooled(runs: list[Path]) -> dict[str, Any]:
    """One entry for `results.json`. Raises ValueError where a run was not evaluated, or two held out one directory."""
    lasts, scores, records = [], [], list[StatementRecord]()
    for folder in runs:
        evaluations = read_evaluations(folder)
        if not evaluations or not (folder / STATEMENT_SCORES).exists():
            raise ValueError(f"{folder}: holds no evaluated statements; run it to its end with data.statements_file")
        score, held_out = read_scores(folder / STATEMENT_SCORES)
        shared = {record.directory for record in held_out} & {record.directory for record in records}
        if shared:
            raise ValueError(
                f"{folder}: directory {min(shared)} was held out by an earlier run too; name each fold once"
            )
        lasts.append(evaluations[-1])
        scores.append(score)
        records += held_out
    if len({last["protocol"] for last in lasts}) > 1:
        raise ValueError(f"{runs[0]} and others: were evaluated by different protocols; pool runs of one kind")
    metrics = {name: float(np.mean([last["metrics"][name] for last in lasts])) for name in lasts[0]["metrics"]}
    is_judged, score = "reasoning/accuracy" in metrics, np.concatenate(scores)
    found = truth_metrics(score > 0, records) if is_judged else statement_metrics(score, records)
    kind = "reasoning" if is_judged else "statements"
    return {
        "protocol": f"{lasts[0]['protocol']}-folds",
        "split": "held-out directories",
        "checkpoint": [f"{folder.name}/{last['checkpoint']}" for folder, last in zip(runs, lasts)],
        "seed": lasts[0]["seed"],
        "versions": lasts[0]["versions"],
        "metrics": metrics | {f"{kind}/{name}": value for name, value in found.items()},
    }


def main() -> None:
    """Parse the command line, pool, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one a fold")
    parser.add_argument("--to", type=Path, required=True, help="the results file to write")
    arguments = parser.parse_args()
    entry = pooled(arguments.runs)
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.to, json.dumps({"evaluations": [entry]}, indent=1) + "\n")
    for name, value in entry["metrics"].items():
        print(f"{name:28} {value:6.1f}")


if __name__ == "__main__":
    run(main)
