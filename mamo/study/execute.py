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
from dataclasses import dataclass
from pathlib import Path

from mamo.study.report import write_report
from mamo.study.results import append_row, finished_row, read_rows
from mamo.study.spec import SeedSet, Study, Trial
from mamo.training.checkpoint import step_folder
from mamo.training.run_dir import CONFIG

logger = logging.getLogger(__name__)

MAMO = (sys.executable, "-m", "mamo")
"""The program that runs a cell."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Cells that run one after the other: one, or those that share a pre-training, which runs first."""

    pretraining: Trial | None
    """None where there is none to run: it has finished, or the cell starts from nothing."""
    cells: list[Trial]

    @property
    def runs(self) -> list[Trial]:
        """All runs in their order."""
        return self.cells if self.pretraining is None else [self.pretraining, *self.cells]


def harvest_finished(cells: Sequence[Trial], runs: Path, results: Path) -> list[Trial]:
    """Take over what finished runs left in their folders; returns the cells that remain to run, each identity once.

    A run that is taken over loses its weights (its curves and results stay): a study's hundreds would fill the disk.
    So does a pre-training, once no cell that remains starts from it.
    """
    rows = read_rows(results)
    waiting: dict[str, Trial] = {}
    for cell in cells:
        if cell.config_hash in rows or cell.config_hash in waiting:
            continue
        row = finished_row(cell, runs)
        if row is None:
            waiting[cell.config_hash] = cell
            continue
        append_row(results, row)
        rows[cell.config_hash] = row
        shutil.rmtree(runs / cell.config_hash / "checkpoints", ignore_errors=True)
    needed = {cell.pretraining.config_hash for cell in waiting.values() if cell.pretraining is not None}
    for cell in cells:
        if cell.pretraining is not None and cell.pretraining.config_hash not in needed:
            shutil.rmtree(runs / cell.pretraining.config_hash / "checkpoints", ignore_errors=True)
    return list(waiting.values())


def pipelines(cells: Sequence[Trial], runs: Path) -> list[Pipeline]:
    """The runs that cells ask for; any two chains may run side by side."""
    of_first: dict[str, list[Trial]] = {}
    for cell in cells:
        of_first.setdefault((cell.pretraining or cell).config_hash, []).append(cell)
    found = []
    for members in of_first.values():
        before = members[0].pretraining
        found.append(Pipeline(None if before is None or _is_trained(before, runs) else before, members))
    return found


def _is_trained(cell: Trial, runs: Path) -> bool:
    return step_folder(runs / cell.config_hash, cell.config.training.total_steps).is_dir()


def command(cell: Trial, runs: Path, program: Sequence[str] = MAMO) -> list[str]:
    """Return the command line that runs a cell, or resumes it; `program` takes the arguments of the `mamo` command."""
    folder = runs / cell.config_hash
    start = [] if cell.pretraining is None else [f"checkpoint={runs / cell.pretraining.config_hash}"]
    resume = ["--resume"] if (folder / CONFIG).exists() else []
    base = [*program, "finetune" if start else "pretrain", "--config", str(cell.file), *resume]
    return [*base, *cell.overrides, *start, f"output_dir={folder}"]


def shell_lines(study: Study, seeds: SeedSet, runs: Path, results: Path, program: Sequence[str] = MAMO) -> list[str]:
    """The commands of the cells that remain, one chain a line, in any order and on any machine that shares `runs`."""
    remaining = harvest_finished(study.cells(seeds), runs, results)
    return [
        " && ".join(shlex.join(["python", *command(cell, runs, program)[1:]]) for cell in chain.runs)
        for chain in pipelines(remaining, runs)
    ]


def run_study(
    study: Study, seeds: SeedSet, jobs: int, runs: Path, results: Path, program: Sequence[str] = MAMO
) -> list[Path]:
    """Run the cells that remain, `jobs` at a time, and write the report as they finish; returns the report's files.

    Raises:
        ValueError: some cells failed, or a planned metric does not exist.
    """
    if jobs < 0:
        raise ValueError(f"--jobs: {jobs} is below 0; give 1 or more, or 0 to report alone")

    def report() -> list[Path]:
        return write_report(study, read_rows(results), results)

    cells = harvest_finished(study.cells(seeds), runs, results)
    logger.info("%s: %d cells to run, %d finished", study.name, len(cells), len(read_rows(results)))
    if cells and jobs:
        run_cells(cells, jobs, runs, results, program, report)
    return report()


def run_cells(
    cells: Sequence[Trial],
    jobs: int,
    runs: Path,
    results: Path,
    program: Sequence[str],
    after_each: Callable[[], object],
) -> None:
    """Run cells, `jobs` chains at a time, the processor's cores shared evenly; `after_each` follows a finished chain.

    What a run prints goes to `IDENTITY.log.txt` beside its folder. Broken off, the running ones are stopped; each
    goes on from its own last checkpoint the next time.

    Raises:
        ValueError: some cells failed; the others ran.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, threads)}
    runs.mkdir(parents=True, exist_ok=True)
    processes: set[subprocess.Popen[bytes]] = set()
    is_stopped = threading.Event()

    def run(cell: Trial) -> bool:
        if is_stopped.is_set():
            return False
        with _log(cell, runs).open("ab") as log:
            words = command(cell, runs, program)
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        processes.add(process)
        try:
            return process.wait() == 0
        finally:
            processes.discard(process)

    def run_chain(chain: Pipeline) -> dict[str, Trial]:
        """The run that failed a cell, by the cell's identity; none where all came to their end."""
        if chain.pretraining is not None and not run(chain.pretraining):
            return {cell.config_hash: chain.pretraining for cell in chain.cells}
        return {cell.config_hash: cell for cell in chain.cells if not run(cell)}

    failed: list[str] = []
    n_ended = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_chain, chain): chain for chain in pipelines(cells, runs)}
        try:
            for future in concurrent.futures.as_completed(futures):
                chain = futures[future]
                to_blame = {
                    cell.config_hash: cell for cell in harvest_finished(chain.cells, runs, results)
                } | future.result()
                for cell in chain.cells:
                    n_ended += 1
                    if cell.config_hash in to_blame:
                        log = _log(to_blame[cell.config_hash], runs)
                        failed.append(f"{cell.variant}, seed {cell.seed}: see {log}")
                        logger.error("failed: %s", failed[-1])
                    else:
                        logger.info("%d of %d: %s, seed %d", n_ended, len(cells), cell.variant, cell.seed)
                after_each()
        except BaseException:
            is_stopped.set()
            for process in list(processes):
                process.terminate()
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed:\n  " + "\n  ".join(failed))


def _log(cell: Trial, runs: Path) -> Path:
    return runs / f"{cell.config_hash}.log.txt"
