"""Choose device and precision once, at the start of a run; the choice is written into the resolved config."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TIMED_STEPS = 3
PROBE_SIDE = 512
"""Rows and columns of the product that shows whether bf16 is fast: where it is not, a large one takes a minute."""

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
def deterministic_operations(is_wanted: bool) -> Iterator[None]:
    """Within it, if wanted, PyTorch computes the same bits each time, on a GPU too.

    An operation that has no such way raises an error that names it. Attention keeps to PyTorch's kernels of fixed
    order. On a CPU every operation of ours has a fixed order anyway.
    """
    if not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS may vary
    is_efficient: bool = torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    before = torch.are_deterministic_algorithms_enabled(), is_efficient
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds in any order
    memory: Any = torch.utils.deterministic
    fills, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # no result depends on it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cuda.enable_mem_efficient_sdp(before[1])
        memory.fill_uninitialized_memory = fills


@contextmanager
def cast_parameters(precision: Precision, modules: Iterable[nn.Module]) -> Iterator[None]:
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
        parameter: parameter.to(DTYPES[precision]) for parameter in dict.fromkeys(p for _, _, p in owners)
    }
    for parameters, name, parameter in owners:
        parameters[name] = rounded[parameter]
    try:
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter


def choose_precision(device: torch.device, run_step: Callable[[Precision], None]) -> Precision:
    """Return the fastest precision that trains well on `device`.

    On a GPU bf16 where it has fast bf16, else fp16. On a CPU bf16 products are several times as fast as those of fp32,
    or, where they are emulated, a hundred times as slow: a small product shows it, and only where bf16 is faster in it
    are steps timed.

    Args:
        device: of the run.
        run_step: forward and backward pass of a batch in the named precision; moves no state.
    """
    if device.type == "cuda":
        chosen: Precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        logger.info("precision: %s (%s)", chosen, torch.cuda.get_device_name(device))
        return chosen
    product_s = product_seconds()
    if product_s["bf16"] > product_s["fp32"]:
        logger.info(
            "precision: fp32 (this machine's bf16 products take %.0f times as long)",
            product_s["bf16"] / product_s["fp32"],
        )
        return "fp32"
    step_s = {name: _shortest_seconds(lambda: run_step(name)) for name in product_s}  # noqa: B023
    chosen = min(step_s, key=lambda name: step_s[name])
    logger.info("precision: %s (a step takes fp32 %.3f s, bf16 %.3f s)", chosen, step_s["fp32"], step_s["bf16"])
    return chosen


def product_seconds() -> dict[Precision, float]:
    """Return the seconds of a square matrix product of this CPU in fp32 and in bf16."""
    factors: dict[Precision, Tensor] = {
        name: torch.rand(PROBE_SIDE, PROBE_SIDE).to(DTYPES[name]) for name in ("fp32", "bf16")
    }
    return {name: _shortest_seconds(lambda: factor @ factor) for name, factor in factors.items()}  # noqa: B023


def _shortest_seconds(work: Callable[[], object]) -> float:
    """Return the shortest of `TIMED_STEPS` durations, after one that is not counted."""
    durations = []
    for _ in range(TIMED_STEPS + 1):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return min(durations[1:])


class LossScale:
    """Dynamic loss scale of fp16 training (Micikevicius et al. 2018).

    The loss is multiplied by `value`, so that small gradients do not vanish in fp16, and the fp32 gradients are divided
    by it. Where a gradient overflows, the step is left out and `value` is halved; after `GROWTH_STEPS` steps without
    overflow it is doubled. It is a power of two, which changes no digit.

    Attributes: float scalars on the device, so that no step waits for them.
        value: factor of the loss.
        steps_since: finite steps since it changed.
        overflows: steps left out so far.
        in_a_row: steps left out since the last finite one.
    """

    GROWTH_STEPS = 2000
    MOST_IN_A_ROW = 8
    """More overflows in a row end the run."""

    def __init__(
        self,
        value: float = 2.0**16,
        steps_since: int = 0,
        overflows: int = 0,
        in_a_row: int = 0,
        device: torch.device | None = None,
    ) -> None:
        numbers = (value, steps_since, overflows, in_a_row)
        self._state = torch.tensor(numbers, dtype=torch.float32, device=device)

    @property
    def value(self) -> Tensor:
        return self._state[0]

    @property
    def overflows(self) -> Tensor:
        return self._state[2]

    def record(self, is_finite: Tensor, counts: Tensor) -> None:
        """Count a step and move the scale, if `counts`; both are bool scalars."""
        value, since, overflows, in_a_row = self._state.unbind()
        value = torch.where(is_finite, value, value / 2)
        since, in_a_row = (since + 1) * is_finite, (in_a_row + 1) * ~is_finite
        grows = since == self.GROWTH_STEPS
        moved = torch.stack([torch.where(grows, value * 2, value), since * ~grows, overflows + ~is_finite, in_a_row])
        self._state = torch.where(counts, moved, self._state)

    def can_go_on(self) -> Tensor:
        """Return whether there are few enough overflows in a row, a bool scalar."""
        return self._state[3] <= self.MOST_IN_A_ROW

    def numbers(self) -> dict[str, float]:
        """Read the attributes, for a checkpoint."""
        value, *counts = self._state.tolist()
        return {"value": value, **dict(zip(("steps_since", "overflows", "in_a_row"), map(int, counts)))}
