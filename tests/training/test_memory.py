"""A lack of memory is one message that names the keys to lower."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mamo.config.schema import RunConfig
from mamo.trainer import train
from mamo.training import memory
from mamo.training.memory import free_bytes, memory_errors
from tests.tiny import config_of

pytestmark = pytest.mark.usefixtures("no_curves")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("numel: integer multiplication overflow"),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000, 100000000000]"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_each_lack_of_memory_names_the_keys(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], error: Exception
) -> None:
    """Bug: out of memory is a traceback with exit code 1, without a hint at what to lower."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("mamo.training.loop.Loop.backward", fail)
    message = fails(lambda: train(tiny(), is_resume=False))
    assert message.startswith("out of memory: lower training.micro_batch_size (now 8; the steps stay the same)")
    assert "evaluation.batch_size (now 256)" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shape '[2]' is invalid"), OSError(errno.ENOENT, "No such file")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    """Bug: a mistake in a network is reported as a lack of memory."""
    with pytest.raises(type(error)) as caught, memory_errors(config_of()):
        raise error
    assert caught.value is error


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from mamo.cli import run
from mamo.training.memory import free_bytes
limit = 8 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert free_bytes(torch.device("cpu")) < limit
from mamo.tasks.registry import load_config
from mamo.trainer import train
run(lambda: train(load_config(Path(sys.argv[1])), False))
"""


@pytest.mark.slow
def test_a_real_lack_of_memory_is_one_line(tiny_file: Callable[..., Path]) -> None:
    """Bug: what PyTorch raises on a CPU is a RuntimeError, which no type tells from others."""
    file = tiny_file(
        training={"batch_size_global": 512}, data={"image_size_px": 1024, "train_scenes": 8}, losses={"queue_size": 0}
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "\nerror: out of memory: lower training.micro_batch_size (now 512;" in "\n" + done.stderr


def test_free_memory_is_what_all_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a container's or a shell's limit is not seen, and the process is killed."""
    files: dict[str, Any] = {"/proc/meminfo": "MemTotal: 90 kB\nMemAvailable:   50 kB\n"}
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert free_bytes(torch.device("cpu")) == 50 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "30000\n", "/sys/fs/cgroup/memory.current": "10000\n"}
    assert free_bytes(torch.device("cpu")) == 20_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_bytes(torch.device("cpu")) == 50 * 1024
