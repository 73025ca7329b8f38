"""What a step of each variant costs, so that variants can be given equal compute."""

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
    """Median processor seconds of a whole training step (loading included) by variant, on this process's threads.

    The variants take turns, so that what else the machine does falls on all of them alike; processor time, since the
    clock on the wall would count the waiting for others. Use one thread (OMP_NUM_THREADS=1): idle threads may spin.
    """
    seed = study.file.explore_seeds[0]
    if study.file.finetune is not None:
        raise ValueError(f"{study.name}: --measure times runs that start from nothing; this study's fine-tune")
    with tempfile.TemporaryDirectory() as scratch:  # where a non-finite loss would leave its file
        steppers = {}
        for name in study.variants:
            values = study.cell(name, seed).config.model_dump()
            config = build_config(merge(values, {"training": {"total_steps": 10_000}}))
            run = TrainingRun(config)
            precision = config.training.precision
            if precision == "auto":
                raise ValueError(f"{study.name}: training.precision: give fp32 or bf16; a study needs the same for all")
            run.task.network.train()
            steppers[name] = (run, run.dry_run_loop(precision, Path(scratch)), run.batches(0, workers=0))
        spent: dict[str, list[float]] = {name: [] for name in steppers}
        for number in range(ROUNDS + 1):
            for name, (run, loop, batches) in steppers.items():
                started = time.process_time()
                loop.step(next(batches).to(run.device), number)
                spent[name].append(time.process_time() - started)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}  # the first warms up


def cost_lines(study: Study) -> list[str]:
    """A table: seconds a step, and the steps that cost as much as the baseline's run."""
    seconds = processor_seconds_per_step(study)
    baseline = study.file.baseline
    total = study.cell(baseline, study.file.explore_seeds[0]).config.training.total_steps
    lines = [f"{'variant':32} {'s a step':>9} {'of baseline':>12} {'steps of equal cost':>20}"]
    for name, value in seconds.items():
        ratio = value / seconds[baseline]
        lines.append(f"{name:32} {value:9.3f} {ratio:12.3f} {round(total / ratio):20d}")
    return lines
