"""Data sets behind one interface, and the loader that feeds the loop."""

import atexit
import contextlib
import multiprocessing
import re
import signal
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mamo.data.collate import sample_rng
from mamo.data.images import BadSampleError
from mamo.data.sampler import StepSampler

LOAD_STREAM = 0
"""Sub-stream of a sample's random numbers that chooses the caption and augments the image."""


class SampleDataset(Protocol):
    """Random access to the samples of a task."""

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """Sample `index`; `rng` chooses among captions and augments."""
        ...

    @property
    def group_size(self) -> int:
        """Consecutive samples (from a multiple of it on) that stay side by side in the order of an epoch."""
        ...

    def identity(self) -> Iterator[str]:
        """Texts that together change with the data, for its fingerprint."""
        ...

    def dataset_names(self) -> list[str]:
        """Names of the data sets that the samples come from, as far as they are known."""
        ...


class EpochDataset(Dataset[tuple[int, Any]]):
    """Gives the loader sample (epoch, index), its random numbers seeded by (seed, epoch, index)."""

    def __init__(self, source: SampleDataset, seed: int) -> None:
        self.source = source
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        epoch, index = key
        return epoch, self.source.load(index, sample_rng(self.seed, epoch, index, LOAD_STREAM))


def _begin_worker(worker_id: int) -> None:
    torch.set_num_threads(1)  # the cores belong to the training step
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler sends it to all processes; the run ends its workers


def _end_workers() -> None:
    """Python ends daemonic children that are left at exit by SIGTERM, and would wait for ever for workers, which ignore
    it; only an error leaves some."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def make_loader(
    source: SampleDataset, collator: Any, sampler: StepSampler, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Batches of `source` in the sampler's order; the result does not depend on `workers`."""
    if workers:
        atexit.unregister(_end_workers)  # once, however many loaders
        atexit.register(_end_workers)
    return DataLoader(
        EpochDataset(source, collator.seed),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_begin_worker,
        multiprocessing_context=multiprocessing.get_context("spawn") if workers else None,
        persistent_workers=False,
    )


# what is raised where a process dies; all but the first as it hands a batch over
_LOST = (RuntimeError, ConnectionResetError, ConnectionRefusedError, BrokenPipeError, EOFError, UnpicklingError)


@contextlib.contextmanager
def loader_errors(workers: int) -> Iterator[None]:
    """Errors of the loader, each as one clear line; `workers` is the number of its processes.

    Around all of the training, not only where batches are taken: PyTorch tells the death of a process by a signal,
    whose error is raised wherever the run happens to be.

    Raises:
        BadSampleError: one that the policy does not forgive, told alike whether or not it was met in a worker process.
        ChildProcessError: a worker process died.
    """
    try:
        yield
    except BadSampleError as error:  # the loader puts the traceback of a worker into the message
        found = re.findall(r"^[\w.]*BadSampleError: (.*)", str(error), re.MULTILINE | re.DOTALL)
        error.__traceback__ = None  # its frames hold the workers, which are stopped as soon as it lets go
        raise BadSampleError(found[-1].strip() if found else str(error)) from None
    except _LOST as error:
        if isinstance(error, RuntimeError) and not re.search("DataLoader worker|ancillary data", str(error)):
            raise
        raise ChildProcessError(
            f"a loader process died, killed perhaps for want of memory ({error}): lower data.workers "
            f"(now {workers}) or data.image_size_px, then continue with --resume"
        ) from None


def collate_range(source: SampleDataset, collator: Any, indices: Sequence[int]) -> Any:
    """One evaluation batch of the given samples, outside any epoch."""
    return collator([(0, source.load(i, sample_rng(collator.seed, 0, i, LOAD_STREAM))) for i in indices])
