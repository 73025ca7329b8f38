"""Running a study's cells: each a process of its own, several at a time, none twice."""

import concurrent.futures
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from mamo.study.plan import Cell, SeedSet, Study
from mamo.study.report import write_report
from mamo.study.results import append_row, finished_row, read_rows
from mamo.training.run_folder import CONFIG

logger = logging.getLogger(__name__)

LOG = "log.txt"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def collect(cells: Sequence[Cell], runs: Path, results: Path) -> list[Cell]:
    """Take over what finished runs left in their folders; returns the cells that remain to run, each identity once.

    A run that is taken over loses its weights (its curves and results stay): a study's hundreds would fill the disk.
    """
    rows = read_rows(results)
    waiting: dict[str, Cell] = {}
    for cell in cells:
        if cell.identity in rows or cell.identity in waiting:
            continue
        row = finished_row(cell, runs / cell.identity)
        if row is None:
            waiting[cell.identity] = cell
            continue
        append_row(results, row)
        rows[cell.identity] = row
        shutil.rmtree(runs / cell.identity / "checkpoints", ignore_errors=True)
    return list(waiting.values())


def command(study: Study, cell: Cell, runs: Path, script: Path) -> list[str]:
    """What runs a cell, or goes on with it where it was begun."""
    folder = runs / cell.identity
    resume = ["--resume"] if (folder / CONFIG).exists() else []
    base = [sys.executable, str(script), "--config", str(study.base), *resume]
    return [*base, *cell.overrides, f"output_dir={folder}"]


def shell_lines(study: Study, seeds: SeedSet, runs: Path, results: Path, script: Path) -> list[str]:
    """The commands of the cells that remain, one a line, in any order and on any machine that shares `runs`."""
    remaining = collect(study.cells(seeds), runs, results)
    return [shlex.join(["python", *command(study, cell, runs, script)[1:]]) for cell in remaining]


def run_study(study: Study, seeds: SeedSet, jobs: int, runs: Path, results: Path, script: Path) -> list[Path]:
    """Run the cells that remain, `jobs` at a time, and write the report after each; returns the report's files.

    Raises:
        ValueError: some cells failed, or a planned metric does not exist.
    """
    if jobs < 0:
        raise ValueError(f"--jobs: {jobs} is below 0; give 1 or more, or 0 to report alone")

    def report() -> list[Path]:
        return write_report(study, read_rows(results), results)

    cells = collect(study.cells(seeds), runs, results)
    logger.info("%s: %d cells to run, %d finished", study.name, len(cells), len(read_rows(results)))
    if cells and jobs:
        run_cells(study, cells, jobs, runs, results, script, report)
    return report()


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    jobs: int,
    runs: Path,
    results: Path,
    script: Path,
    after_each: Callable[[], object],
) -> None:
    """Run cells, `jobs` at a time, the processor's cores shared evenly; `after_each` is called when one has finished.

    What a cell prints goes to `IDENTITY.log.txt` beside its folder. Broken off, the running cells are stopped; each
    goes on from its own last checkpoint the next time.

    Raises:
        ValueError: some cells failed; the others ran.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, threads)}
    runs.mkdir(parents=True, exist_ok=True)
    processes: set[subprocess.Popen[bytes]] = set()
    is_stopped = threading.Event()

    def run(cell: Cell) -> int:
        if is_stopped.is_set():
            return 0
        with (runs / f"{cell.identity}.{LOG}").open("ab") as log:
            process = subprocess.Popen(
                command(study, cell, runs, script), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        processes.add(process)
        try:
            return process.wait()
        finally:
            processes.discard(process)

    failed = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, cell): cell for cell in cells}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                cell = futures[future]
                if future.result() == 0 and not collect([cell], runs, results):
                    after_each()
                    logger.info("%d of %d: %s, seed %d", number, len(cells), cell.variant, cell.seed)
                else:
                    failed.append(f"{cell.variant}, seed {cell.seed}: see {runs / f'{cell.identity}.{LOG}'}")
                    logger.error("failed: %s", failed[-1])
        except BaseException:
            is_stopped.set()
            for process in list(processes):
                process.terminate()
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed:\n  " + "\n  ".join(failed))
