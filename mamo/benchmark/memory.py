"""Measure peak memory of training steps against the prediction of `--plan`, and the time to save and resume.

On a CPU the peak is that of the process, as Linux counts it. It is measured in a fresh process, above the memory of the
imported libraries.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from mamo import estimate
from mamo.benchmark.cases import Case, build_case
from mamo.benchmark.timing import Rounds, seconds
from mamo.trainer import TrainingRun, load_checkpoint
from mamo.training import run_dir
from mamo.training.async_writer import AsyncWriter
from mamo.training.precision import Precision

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Run `function(*arguments)`, both importable by name, in a new process with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, arguments)


def measure_memory(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure the peak of two steps, its prediction and their ratio, with and without activation checkpointing."""
    found: dict[str, float] = {}
    prefix = f"memory/{case.preset}"
    for name, is_checkpointed in ((prefix, False), (f"{prefix}/checkpointing", True)):
        one = replace(case, activation_checkpointing=is_checkpointed)
        peak = in_fresh_process(peak_mib, one, folder, device, precision)
        predicted = predicted_mib(one, folder, device, precision)
        found |= {
            f"{name}/peak_mib": peak,
            f"{name}/predicted_mib": predicted,
            f"{name}/predicted_over_peak": predicted / peak,
        }
    return found | {
        f"{prefix}/checkpointing/over_plain": found[f"{prefix}/checkpointing/peak_mib"] / found[f"{prefix}/peak_mib"]
    }


def predicted_mib(case: Case, folder: Path, device: torch.device, precision: Precision) -> float:
    """Predict the peak memory of a step as `--plan` does, in MiB."""
    run, loop, batch = build_case(case, folder, device, precision)
    in_passes = estimate.peak_bytes(lambda: loop.backward(batch, 0))
    return sum(estimate.memory_bytes(run, in_passes + estimate.batch_bytes(batch)).values()) / 2**20


def peak_mib(case: Case, folder: Path, device: torch.device, precision: Precision) -> float:
    """Measure the peak memory of building a run and two steps, in MiB above the memory in use before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
    before = _peak_resident_mib()
    _, loop, batch = build_case(case, folder, device, precision)
    for step in range(2):
        loop.step(batch, step)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _peak_resident_mib() - before


def _peak_resident_mib() -> float:
    """Return the peak resident memory by Linux's own count; `ru_maxrss` would include memory of the parent process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def measure_checkpoint(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure the seconds that a save stops training, the seconds to resume, and the size of a checkpoint."""
    folder = folder / f"checkpoint-{case.preset}"
    folder.mkdir()
    run = TrainingRun(case.config(folder, device.type, precision))
    run_dir.create_output_dir(run.output_dir)
    run_dir.write_config(run.output_dir, run.config)
    run.tokenizer.save_pretrained(run.output_dir / "tokenizer")
    loop = run.loop([])
    _, _, batch = build_case(case, folder, device, precision)
    loop.step(batch, 0)  # creates the optimizer state
    rounds = Rounds()
    for number in range(1, 4):
        started = time.perf_counter()
        with AsyncWriter() as writing:
            pause = seconds(lambda: loop.save(number, writing), device)  # noqa: B023 (called at once)
        rounds.add(save_s=pause, written_s=time.perf_counter() - started)
        started = time.perf_counter()
        load_checkpoint(TrainingRun(run.config, is_resume=True))
        rounds.add(resume_s=time.perf_counter() - started)
    last = run.output_dir / "checkpoints" / "last"
    size = sum(path.stat().st_size for path in last.resolve().rglob("*") if path.is_file())
    return rounds.summary(f"checkpoint/{case.preset}") | {f"checkpoint/{case.preset}/size_mib": size / 2**20}
