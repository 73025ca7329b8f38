"""Choose device and precision once, at the start of a run; the choice is written into the resolved config."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TIMED_STEPS = 3


class DeviceError(ValueError):
    """Unknown or missing device: CUDA without a GPU, a GPU index that does not exist, or an invalid name.

    >>> import mamo, torch
    >>> if not torch.cuda.is_available():
    ...     try:
    ...         mamo.load("runs/scenes", device="cuda")
    ...     except mamo.DeviceError as error:
    ...         assert "has no GPU" in str(error)
    """


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device named by `auto` (a GPU if there is one), `cpu`, `cuda` (the current GPU) or `cuda:N`.

    Raises:
        DeviceError: there is no such device.
    """
    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if has_cuda else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device {name!r} is not valid; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise DeviceError(f"device: {name} was requested, but this machine has no GPU; use cpu or auto")
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device: {name} was requested, but this machine has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def cast_parameters(precision: Literal["fp32", "bf16"], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Cast the modules' weights, and so their activations and gradients, to `precision` within the block.

    Each module uses copies that are cast once. Gradients pass through the casts, so they accumulate in fp32; the
    optimizer and the teacher's EMA never see rounded weights. FSDP's `param_dtype` does the same. Compared with
    `torch.autocast` it saves the casts around every norm and sum, which on a CPU cost more than the matrix products.
    Scalars (the temperature) stay fp32; losses are computed in fp32.
    """
    if precision == "fp32":
        yield
        return
    owners = [
        (owner._parameters, name, parameter)
        for module in modules
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.ndim > 0
    ]
    rounded: dict[Tensor, Any] = {
        parameter: parameter.bfloat16() for parameter in dict.fromkeys(p for _, _, p in owners)
    }
    for parameters, name, parameter in owners:
        parameters[name] = rounded[parameter]
    try:
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter


def choose_precision(run_step: Callable[[Literal["fp32", "bf16"]], None]) -> Literal["fp32", "bf16"]:
    """Time `run_step` (forward and backward, no state changes) in both precisions; return the faster one.

    bf16 matrix products are several times as fast as fp32 on some CPUs, and slower, as they are emulated, on others.
    """
    seconds: dict[Literal["fp32", "bf16"], float] = {}
    for precision in ("fp32", "bf16"):
        run_step(precision)  # warm-up
        durations = []
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            run_step(precision)
            durations.append(time.perf_counter() - started)
        seconds[precision] = min(durations)
    chosen = min(seconds, key=lambda name: seconds[name])
    logger.info("precision: %s (a step takes fp32 %.3f s, bf16 %.3f s)", chosen, seconds["fp32"], seconds["bf16"])
    return chosen
