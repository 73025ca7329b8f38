"""Process group of a run and its collectives; with a single process each collective is the identity.

`torchrun` starts the processes and sets the environment variables. Without it there is one process and no group.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
R = TypeVar("R")

STEP_TIMEOUT = timedelta(minutes=10)
"""Timeout of a collective within a step; after it the other ranks count as lost."""
WAIT_TIMEOUT = timedelta(days=2)
"""Timeout of the other ranks while rank 0 evaluates or writes."""
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out", re.IGNORECASE)
_cpu_group: Any = None  # gloo group with `WAIT_TIMEOUT`


class RankLostError(ConnectionError):
    """Another rank of the run ended or cannot be reached."""


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the process group that `torchrun` started; do nothing without `torchrun`.

    Args:
        device: `training.device`; unless it is `cpu`, each process takes the GPU of its local rank where there is one.
    """
    global _cpu_group
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    is_cuda = device != "cpu" and torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # after a restart torchrun's store still holds the addresses of the previous processes, which are gone
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start-{restart}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=STEP_TIMEOUT)
    _cpu_group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    try:
        yield
    finally:
        _cpu_group = None
        dist.destroy_process_group()


@contextlib.contextmanager
def detect_lost_ranks() -> Iterator[None]:
    """Convert a failed collective into one `RankLostError` message.

    Raises:
        RankLostError: another rank died or did not answer within the timeout; replaces the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _LOST.search(str(error)):
            raise
        raise RankLostError(
            f"process {rank()} of {world_size()} lost contact with another process, which was killed or failed (see "
            f"its own message): {str(error).splitlines()[0]}. Continue from the last checkpoint with --resume"
        ) from error


def all_gather_no_grad(tensor: Tensor) -> Tensor:
    """Gather [B, ...] of each rank -> [world * B, ...] in rank order, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether a tensor is split over the processes; without an import of the library that splits it."""
    return hasattr(tensor, "full_tensor")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def sum_counts(counts: Sequence[int]) -> list[int]:
    """Sum a few whole numbers over ranks; waits for all ranks, on the CPU.

    A fifth of the time of `all_gather_object`, which pickles and takes two rounds.
    """
    if world_size() == 1:
        return list(counts)
    summed = torch.tensor(counts)
    dist.all_reduce(summed, group=_cpu_group)
    return summed.tolist()


def all_gather_object(value: T) -> list[T]:
    """Gather a plain Python value (or CPU tensors) of every rank, in rank order; waits for all ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def map_over_ranks(work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """Map `work` over `parts`, divided among the ranks. Every rank returns all results, in order.

    Rank r processes parts r, r + world, r + 2 world, ... Every rank must pass the same number of parts. Results are
    gathered as plain Python values or CPU tensors. They do not depend on the number of ranks if `work` depends only on
    its part.

    Raises:
        ValueError, OSError: what `work` raised, on every rank.
    """
    own: list[R] | Exception
    try:
        own = [work(part) for part in parts[rank() :: world_size()]]
    except (ValueError, OSError) as error:
        if world_size() == 1:
            raise
        own = error
    done: list[list[R]] = []
    for found in all_gather_object(own):
        if isinstance(found, Exception):
            raise found
        done.append(found)
    return [done[place % world_size()][place // world_size()] for place in range(len(parts))]


def run_on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank. The lowest rank that failed re-raises; the others exit with code 2."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as raised:
        error = raised
    failed = all_gather_object(error is not None)
    if error is not None and failed.index(True) == rank():
        raise error
    if any(failed):
        raise SystemExit(2)
    return result  # type: ignore[return-value]
