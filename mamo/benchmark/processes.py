"""Measure how samples per second grow with the number of processes (CPU: threads are shared; GPU: one each)."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from mamo.benchmark.cases import Case, build_case
from mamo.benchmark.timing import Rounds, seconds
from mamo.distributed import process_group, world_size
from mamo.training.precision import Precision

ROUNDS = 3
STEPS = 8
WARM_UP_STEPS = 2


def measure_processes(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure samples per second with one and with more processes (DDP), and their ratio; each has the case's batch.

    The numbers of processes are 1, 2, 4, ... up to the number of GPUs; on a CPU 1 and 2, with the same total of
    threads.
    """
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    case.config(folder, device.type, precision)  # writes the tokenizer for all processes
    rounds = Rounds()
    for _ in range(ROUNDS):
        rates = {count: samples_per_s(count, case, folder, device, precision) for count in counts}
        rounds.add(**{f"processes_{count}/samples_per_s": rate for count, rate in rates.items()})
        rounds.add(**{f"processes_{count}/over_one_process": rates[count] / rates[1] for count in counts[1:]})
    return rounds.summary(f"growth/{case.preset}")


def samples_per_s(count: int, case: Case, folder: Path, device: torch.device, precision: Precision) -> float:
    """Measure samples per second of all `count` processes together.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; contains its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = replace(case, batch_size=count * case.batch_size, processes=count)
    threads = max(1, torch.get_num_threads() // count)
    step_s = folder / "step_s"
    arguments = (count, port, threads, of_all, folder, device, precision, step_s)
    spawn(_measure, arguments, nprocs=count)  # type: ignore[no-untyped-call]
    return of_all.batch_size / float(step_s.read_text())


def _measure(
    number: int,
    count: int,
    port: int,
    threads: int,
    case: Case,
    folder: Path,
    device: torch.device,
    precision: Precision,
    step_s: Path,
) -> None:
    """Run process `number` of `count`: take the steps; process 0 writes the seconds per step."""
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(threads)
    with process_group(device.type):
        assert world_size() == count
        _, loop, batch = build_case(case, folder, device, precision)
        loop.join()
        for step in range(WARM_UP_STEPS):
            loop.step(batch, step)
        taken_s = seconds(lambda: loop.step(batch, WARM_UP_STEPS), device, STEPS)  # each step waits for all gradients
    if number == 0:
        step_s.write_text(str(taken_s))
