"""Memory of the machine, and its lack as one message."""

import contextlib
import errno
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from mamo.config.schema import RunConfig

_LACK = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|ALLOC_FAILED"
    r"|multiplication overflow|size calculation overflowed|invalid buffer size|negative dimension",
    re.IGNORECASE,
)
"""In the text of PyTorch's errors, which on a CPU are plain RuntimeErrors."""


@contextlib.contextmanager
def memory_errors(config: RunConfig) -> Iterator[None]:
    """Convert a lack of memory, on the CPU or a GPU, to one line that names the keys to lower.

    Raises:
        ValueError: an allocation failed within the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        is_lack = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            error.errno == errno.ENOMEM if isinstance(error, OSError) else _LACK.search(str(error))
        )
        if not is_lack:
            raise
        training = config.training
        micro = training.micro_batch_size or training.batch_size_global
        error.__traceback__ = None  # its frames hold the tensors
        raise ValueError(
            f"out of memory: lower training.micro_batch_size (now {micro}; the steps stay the same), in an evaluation "
            f"evaluation.batch_size (now {config.evaluation.batch_size}), or data.image_size_px and the sizes of model"
        ) from None


def free_bytes(device: torch.device) -> int:
    """Return the memory that a process can still take: of the GPU, or of the machine, its cgroup and its limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_available_bytes(), *_cgroup_bytes()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int((_read("/proc/self/statm").split() or ["0"])[0])
        found.append(max(0, limit - pages * resource.getpagesize()))
    return min(found)


def _available_bytes() -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 2**63


def _cgroup_bytes() -> Iterator[int]:
    """Yield what a container's limit leaves, where there is one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        numbers = [text.strip() for text in (_read(limit), _read(used))]
        if all(number.isdigit() for number in numbers):
            yield max(0, int(numbers[0]) - int(numbers[1]))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
