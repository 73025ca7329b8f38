"""Aggregate runs that each held out one fold of the statements."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mamo.config.values import Values
from mamo.evaluation.metrics.statements import StatementRecord, read_scores, statement_metrics, truth_metrics
from mamo.evaluation.protocols import current_name
from mamo.training.run_dir import STATEMENT_SCORES, read_evaluations


def aggregate_folds(runs: Sequence[Path]) -> Values:
    """Return one entry for `results.json`.

    Raises:
        ValueError: a run was not evaluated, two runs held out one directory, or their protocols differ.
    """
    lasts, scores, records = [], [], list[StatementRecord]()
    for folder in runs:
        evaluations = read_evaluations(folder)
        if not evaluations or not (folder / STATEMENT_SCORES).exists():
            raise ValueError(f"{folder}: no evaluated statements; finish the run with data.statements_file")
        score, held_out = read_scores(folder / STATEMENT_SCORES)
        shared = {record.directory for record in held_out} & {record.directory for record in records}
        if shared:
            raise ValueError(f"{folder}: an earlier run also held out directory {min(shared)}; name each fold once")
        lasts.append(evaluations[-1])
        scores.append(score)
        records += held_out
    if len({current_name(last) for last in lasts}) > 1:
        raise ValueError(f"{runs[0]} and others: evaluated under different protocols; aggregate runs of one task")
    metrics = {name: float(np.mean([last["metrics"][name] for last in lasts])) for name in lasts[0]["metrics"]}
    has_head, score = "reasoning/accuracy" in metrics, np.concatenate(scores)
    aggregated = truth_metrics(score > 0, records) if has_head else statement_metrics(score, records)
    prefix = "reasoning" if has_head else "statements"
    return {
        "protocol": f"{current_name(lasts[0])}-folds",
        "split": "held-out directories",
        "checkpoint": [f"{folder.name}/{last['checkpoint']}" for folder, last in zip(runs, lasts)],
        "seed": lasts[0]["seed"],
        "versions": lasts[0]["versions"],
        "metrics": metrics | {f"{prefix}/{name}": value for name, value in aggregated.items()},
    }
