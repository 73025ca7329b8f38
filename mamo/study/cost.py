"""Measure the cost of a training step of each variant, to compare variants at equal compute."""

import statistics
import tempfile
import time
from pathlib import Path

from mamo.config.values import merge
from mamo.study.spec import Study
from mamo.tasks.registry import build_config
from mamo.trainer import TrainingRun

ROUNDS = 5


def processor_seconds_per_step(study: Study) -> dict[str, float]:
    """Measure the median processor seconds of a training step (loading included) by variant, on this process's threads.

    The variants take turns, so that other load on the machine affects all of them alike. Processor time excludes
    waiting. Use one thread (OMP_NUM_THREADS=1): idle threads may spin.
    """
    seed = study.file.explore_seeds[0]
    if study.file.finetune is not None:
        raise ValueError(f"{study.name}: --measure times runs from random weights; this study fine-tunes")
    with tempfile.TemporaryDirectory() as scratch:  # for the dump of a non-finite loss
        steppers = {}
        for name in study.variants:
            values = study.trial(name, seed).config.model_dump()
            config = build_config(merge(values, {"training": {"total_steps": 10_000}}))
            run = TrainingRun(config)
            precision = config.training.precision
            if precision == "auto":
                raise ValueError(f"{study.name}: training.precision: set fp32 or bf16, the same for all variants")
            run.task.network.train()
            steppers[name] = (run, run.dry_run_loop(precision, Path(scratch)), run.batches(0, workers=0))
        spent: dict[str, list[float]] = {name: [] for name in steppers}
        for number in range(ROUNDS + 1):
            for name, (run, loop, batches) in steppers.items():
                started = time.process_time()
                loop.step(next(batches).to(run.device), number)
                spent[name].append(time.process_time() - started)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}  # the first one is warm-up


def cost_lines(study: Study) -> list[str]:
    """Return a table: seconds per step, and the number of steps that cost as much as the baseline's run."""
    seconds = processor_seconds_per_step(study)
    baseline = study.file.baseline
    total = study.trial(baseline, study.file.explore_seeds[0]).config.training.total_steps
    lines = [f"{'variant':32} {'s a step':>9} {'of baseline':>12} {'steps of equal cost':>20}"]
    for name, value in seconds.items():
        ratio = value / seconds[baseline]
        lines.append(f"{name:32} {value:9.3f} {ratio:12.3f} {round(total / ratio):20d}")
    return lines
