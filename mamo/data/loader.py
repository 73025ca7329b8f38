"""The interface of data sets, and the data loader of the training loop."""

import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mamo.data.collate import Batch, sample_rng
from mamo.data.images import BadSampleError
from mamo.data.sampler import StepSampler

LOAD_STREAM = 0
"""Random stream of a sample for the choice of the caption and the augmentation of the image."""
_IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""Sent to all processes; the main one ends its workers."""


class SampleDataset(Protocol):
    """Interface of a data set: random access to the samples of a task."""

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """Load sample `index`. `rng` draws the caption and the augmentation."""
        ...

    @property
    def group_size(self) -> int:
        """Number of consecutive samples, from a multiple of it on, that stay together in the order of an epoch."""
        ...

    def fingerprint_items(self) -> Iterator[str]:
        """Yield texts that change if the data change; their hash is the fingerprint of the data."""
        ...

    def dataset_names(self) -> list[str]:
        """Return the names of the data sets that the samples come from, where known."""
        ...


BatchT = TypeVar("BatchT", bound=Batch, covariant=True)


class Collator(Protocol[BatchT]):
    """Makes a batch of samples, in the loader's processes."""

    seed: int
    """Of the run."""

    def __call__(self, drawn: Sequence[tuple[int, Any]]) -> BatchT:
        """Collate [(epoch, sample)]."""
        ...


MOST_WORKERS = 16


def count_workers(workers: int | Literal["auto"], device_type: str) -> int:
    """Return the loader processes of `data.workers`.

    `auto` gives each process of a run on GPUs its share of this machine's cores less one, at most `MOST_WORKERS`, and
    one on a CPU, whose cores the steps need.
    """
    if workers != "auto":
        return workers
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1 if device_type == "cpu" else min(max(1, share - 1), MOST_WORKERS)


class EpochDataset(Dataset[tuple[int, Any]]):
    """Map-style data set for PyTorch: key (epoch, index), with random numbers seeded by (seed, epoch, index)."""

    def __init__(self, dataset: SampleDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, index = key
        return epoch, self.dataset.load(index, sample_rng(self.seed, epoch, index, LOAD_STREAM))


def _init_worker(worker_id: int) -> None:
    """Limit the worker to one thread and ignore SIGTERM, SIGHUP and Ctrl-C."""
    torch.set_num_threads(1)  # the training step uses the other cores
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kill the workers that are left at exit, after an error.

    Python would send them SIGTERM, which they ignore, and then wait for them without end.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def make_loader(
    dataset: SampleDataset,
    collator: Collator[Batch],
    sampler: StepSampler,
    workers: int,
    pin_memory: bool,
) -> DataLoader[tuple[int, Any]]:
    """Build the loader of `dataset` in the sampler's order. The batches do not depend on `workers`."""
    if workers:
        atexit.unregister(_kill_workers)  # register once for all loaders
        atexit.register(_kill_workers)
    return DataLoader(
        EpochDataset(dataset, collator.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_init_worker,
        multiprocessing_context=multiprocessing.get_context("spawn") if workers else None,
        persistent_workers=False,
    )


def iterate(loader: DataLoader[tuple[int, Any]], first: Iterable[Any] = ()) -> Iterator[Any]:
    """Yield the batches, from workers that SIGTERM and Ctrl-C do not reach: a terminal sends them to all processes.

    The batches of `first` come before them, while the workers start: that takes them some seconds.

    Where an exception of a signal ends the waiting for a batch, the workers are killed: PyTorch would wait five seconds
    for each.
    """
    if loader.num_workers == 0 or threading.current_thread() is not threading.main_thread():
        yield from first
        yield from loader
        return
    ensure_running()  # now: it would clear the mask
    others = _children()
    batches: Iterator[Any] | None = None
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)  # a process inherits the mask
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from first
        yield from batches
    except (Exception, GeneratorExit):
        raise
    except BaseException as error:
        on_death = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error
        for number in _children() - others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        batches = None  # its end fails, as that of one that is half built, which only frames refer to
        traceback.clear_frames(error.__traceback__)
        sys.unraisablehook = hook
        signal.signal(signal.SIGCHLD, on_death)
        raise


def _children() -> set[int]:
    """Return the numbers of this process's children, those that are being started included; none without /proc."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= set(map(int, file.read_text().split()))
    return found


# errors after the death of a worker; all but the first while a batch is transferred
_WORKER_DEATH_ERRORS = (
    RuntimeError,
    ConnectionResetError,
    ConnectionRefusedError,
    BrokenPipeError,
    EOFError,
    UnpicklingError,
)


@contextlib.contextmanager
def loader_errors(workers: int) -> Iterator[None]:
    """Convert errors of the loader to one line each. `workers` is the number of its processes.

    Use it around the whole training, not only around the iteration: PyTorch reports the death of a worker by a signal,
    so the error can be raised at any line.

    Raises:
        BadSampleError: a sample that the policy does not allow; the same message with and without workers.
        ChildProcessError: a worker died.
    """
    try:
        yield
    except BadSampleError as error:  # PyTorch puts the traceback of the worker into the message
        found = re.findall(r"^[\w.]*BadSampleError: (.*)", str(error), re.MULTILINE | re.DOTALL)
        error.__traceback__ = None  # its frames refer to the workers and would keep them alive
        raise BadSampleError(found[-1].strip() if found else str(error)) from None
    except _WORKER_DEATH_ERRORS as error:
        if isinstance(error, RuntimeError) and not re.search("DataLoader worker|ancillary data", str(error)):
            raise
        raise ChildProcessError(
            f"a data loader worker died, possibly out of memory ({error}): lower data.workers "
            f"(now {workers}) or data.image_size_px, then continue with --resume"
        ) from None


def collate_range(dataset: SampleDataset, collator: Collator[BatchT], indices: Sequence[int]) -> BatchT:
    """Load the samples `indices` (epoch 0) and collate them to one batch."""
    return collator(load_range(dataset, collator.seed, indices))


def load_range(dataset: SampleDataset, seed: int, indices: Sequence[int]) -> list[tuple[int, Any]]:
    """Load the samples `indices` as [(epoch 0, sample)]."""
    return [(0, dataset.load(i, sample_rng(seed, 0, i, LOAD_STREAM))) for i in indices]
