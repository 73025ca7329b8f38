"""Run the trials of a study: each in its own process, several at a time, none twice."""

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
from mamo.study.results import append_row, finished_row, note_sources, read_rows
from mamo.study.spec import SeedSet, Study, Trial
from mamo.training.checkpoint import step_folder
from mamo.training.run_dir import CONFIG

logger = logging.getLogger(__name__)

MAMO = (sys.executable, "-m", "mamo")
"""The program that runs a trial."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Trials that run one after the other: a single one, or several that share a pre-training, which runs first."""

    pretraining: Trial | None
    """None if it has finished, or the trial starts from random weights."""
    trials: list[Trial]

    @property
    def runs(self) -> list[Trial]:
        """List all runs in order."""
        return self.trials if self.pretraining is None else [self.pretraining, *self.trials]


def harvest_finished(trials: Sequence[Trial], runs: Path, results: Path) -> list[Trial]:
    """Add the results of finished runs to `results`; return the trials that remain, each config hash once.

    The weights of a harvested run are deleted (curves and results stay), as those of hundreds of runs would fill the
    disk. The weights of a pre-training are deleted once no remaining trial starts from it.
    """
    rows = read_rows(results)
    waiting: dict[str, Trial] = {}
    for trial in trials:
        if trial.config_hash in rows or trial.config_hash in waiting:
            continue
        row = finished_row(trial, runs)
        if row is None:
            waiting[trial.config_hash] = trial
            continue
        append_row(results, row)
        rows[trial.config_hash] = row
        shutil.rmtree(runs / trial.config_hash / "checkpoints", ignore_errors=True)
    needed = {trial.pretraining.config_hash for trial in waiting.values() if trial.pretraining is not None}
    for trial in trials:
        if trial.pretraining is not None and trial.pretraining.config_hash not in needed:
            shutil.rmtree(runs / trial.pretraining.config_hash / "checkpoints", ignore_errors=True)
    return list(waiting.values())


def pipelines(trials: Sequence[Trial], runs: Path) -> list[Pipeline]:
    """Group trials into pipelines; any two pipelines may run at the same time."""
    of_first: dict[str, list[Trial]] = {}
    for trial in trials:
        of_first.setdefault((trial.pretraining or trial).config_hash, []).append(trial)
    found = []
    for members in of_first.values():
        before = members[0].pretraining
        found.append(Pipeline(None if before is None or _is_trained(before, runs) else before, members))
    return found


def _is_trained(trial: Trial, runs: Path) -> bool:
    return step_folder(runs / trial.config_hash, trial.config.training.total_steps).is_dir()


def command(trial: Trial, runs: Path, program: Sequence[str] = MAMO) -> list[str]:
    """Return the command that starts or resumes a trial; `program` is the command line of `mamo`."""
    folder = runs / trial.config_hash
    start = [] if trial.pretraining is None else [f"checkpoint={runs / trial.pretraining.config_hash}"]
    resume = ["--resume"] if (folder / CONFIG).exists() else []
    base = [*program, "finetune" if start else "pretrain", "--config", str(trial.file), *resume]
    return [*base, *trial.overrides, *start, f"output_dir={folder}"]


def shell_lines(study: Study, seeds: SeedSet, runs: Path, results: Path, program: Sequence[str] = MAMO) -> list[str]:
    """List the commands of the remaining trials, one pipeline a line; any order, any machine that shares `runs`."""
    remaining = harvest_finished(study.trials(seeds), runs, results)
    return [
        " && ".join(shlex.join(["python", *command(trial, runs, program)[1:]]) for trial in pipeline.runs)
        for pipeline in pipelines(remaining, runs)
    ]


def run_study(
    study: Study, seeds: SeedSet, jobs: int, runs: Path, results: Path, program: Sequence[str] = MAMO
) -> list[Path]:
    """Run the remaining trials, `jobs` at a time, and write the report after each; return the report's files.

    Raises:
        ValueError: some trials failed, or a planned metric does not exist.
    """
    if jobs < 0:
        raise ValueError(f"--jobs: {jobs} is negative; use 1 or more, or 0 to only write the report")

    def report() -> list[Path]:
        return write_report(study, read_rows(results), results)

    trials = harvest_finished(study.trials(seeds), runs, results)
    logger.info("%s: %d trials to run, %d finished", study.name, len(trials), len(read_rows(results)))
    if trials and jobs:
        run_trials(trials, jobs, runs, results, program, report)
    return report()


def run_trials(
    trials: Sequence[Trial],
    jobs: int,
    runs: Path,
    results: Path,
    program: Sequence[str],
    after_each: Callable[[], object],
) -> None:
    """Run trials, `jobs` pipelines at a time, with the processor's cores divided evenly.

    The output of a run goes to `HASH.log.txt` next to its folder. If interrupted, running trials are stopped; each
    resumes from its last checkpoint the next time.

    Args:
        trials: the trials to run.
        jobs: number of pipelines at a time.
        runs: parent of the run folders.
        results: folder of `cells.jsonl`.
        program: command line of `mamo`.
        after_each: called after each finished pipeline.

    Raises:
        ValueError: some trials failed; the others ran.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, threads)}
    runs.mkdir(parents=True, exist_ok=True)
    processes: set[subprocess.Popen[bytes]] = set()
    is_stopped = threading.Event()
    starting = threading.Lock()  # an interruption finds every process that was started

    def run(trial: Trial) -> bool:
        words = command(trial, runs, program)
        note_sources(trial, runs)
        with _log(trial, runs).open("ab") as log, starting:
            if is_stopped.is_set():
                return False
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
            processes.add(process)
        try:
            return process.wait() == 0
        finally:
            processes.discard(process)

    def run_pipeline(pipeline: Pipeline) -> dict[str, Trial]:
        """Return failed trials: config hash of the trial -> the run that failed; empty if all finished."""
        if pipeline.pretraining is not None and not run(pipeline.pretraining):
            return {trial.config_hash: pipeline.pretraining for trial in pipeline.trials}
        return {trial.config_hash: trial for trial in pipeline.trials if not run(trial)}

    failed: list[str] = []
    n_ended = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_pipeline, pipeline): pipeline for pipeline in pipelines(trials, runs)}
        try:
            for future in concurrent.futures.as_completed(futures):
                pipeline = futures[future]
                to_blame = {
                    trial.config_hash: trial for trial in harvest_finished(pipeline.trials, runs, results)
                } | future.result()
                for trial in pipeline.trials:
                    n_ended += 1
                    if trial.config_hash in to_blame:
                        log = _log(to_blame[trial.config_hash], runs)
                        failed.append(f"{trial.variant}, seed {trial.seed}: see {log}")
                        logger.error("failed: %s", failed[-1])
                    else:
                        logger.info("%d of %d: %s, seed %d", n_ended, len(trials), trial.variant, trial.seed)
                after_each()
        except BaseException:
            with starting:
                is_stopped.set()
                for process in processes.copy():
                    process.terminate()
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(trials)} trials failed:\n  " + "\n  ".join(failed))


def _log(trial: Trial, runs: Path) -> Path:
    return runs / f"{trial.config_hash}.log.txt"
