"""Let a step move nothing unless all its numbers are finite; on a GPU without waiting for them.

On a CPU the host reads the numbers of a step before the optimizer moves. On a GPU it would wait there for the whole
step, so a flag on the device decides instead: AdamW's fused kernel skips by it, and `held` undoes everything else. The
host reads the numbers of a step once the next one is issued. After a step that ends the run the flag stays set, so that
the next one, which is under way by then, moves nothing either.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mamo.data.collate import Batch
from mamo.distributed import is_sharded
from mamo.training.precision import LossScale


def reads_late(device: torch.device) -> bool:
    """Say whether the host reads the numbers of a step only after it has issued the next one."""
    return device.type == "cuda"


class HostCopy:
    """Numbers on their way from the device to the host, behind the operations issued so far."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.arrival: torch.cuda.Event | None = None
        if values.is_cuda:
            self.arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # its thread sleeps
            self.arrival.record()

    def tolist(self) -> list[float]:
        """Wait for the numbers and return them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        numbers: list[float] = self.values.tolist()
        return numbers


@dataclass
class PendingStep:
    """A step that is issued. `Loop.read` returns its metrics.

    Attributes:
        step: 0-based.
        batch: its samples, kept until its numbers are known.
        names: of the losses and metrics, the gradient norm last.
        numbers: their values and those of `Guard.judge`.
        settings: further values for the log, which the host knows: weights, learning rate.
    """

    step: int
    batch: Batch
    names: tuple[str, ...]
    numbers: HostCopy
    settings: dict[str, float]


class Guard:
    """Decides on the device whether a step moves anything.

    Attributes:
        loss_scale: that of fp16, else None.
        found_inf: float scalar, 1 where the step moves nothing; by its PyTorch name, which fused optimizers read. None
            where the host decides.
        has_failed: bool scalar, whether a step has ended the run.
    """

    def __init__(self, device: torch.device, is_scaled: bool) -> None:
        self.loss_scale = LossScale(device=device) if is_scaled else None
        self.found_inf = torch.zeros((), device=device) if reads_late(device) else None
        self.has_failed = torch.zeros((), dtype=torch.bool, device=device)

    def judge(self, values: Tensor) -> Tensor:
        """Set `found_inf` by the numbers of a step, and move the loss scale.

        A gradient that overflows in fp16 while all else is finite leaves the step out; anything else that is not finite
        ends the run, and so do too many overflows in a row.

        Args:
            values: float [N] of the global batch, the same in every process, the gradient norm last.

        Returns:
            float [N + 3]: `values`, `has_failed`, and the value and the overflows of the loss scale (0 without one).
        """
        is_finite = values.isfinite()
        is_bad = fails = ~is_finite.all()
        scale = [values.new_zeros(()), values.new_zeros(())]
        if self.loss_scale is not None:
            fails = ~is_finite[:-1].all()
            self.loss_scale.record(is_finite[-1], counts=~(fails | self.has_failed))
            fails = fails | ~self.loss_scale.can_go_on()
            scale = [self.loss_scale.value, self.loss_scale.overflows]
        self.has_failed = self.has_failed | fails
        if self.found_inf is not None:
            self.found_inf = (is_bad | self.has_failed).float()
        return torch.cat([values, torch.stack([self.has_failed.float(), *scale]).to(values.dtype)])


@contextlib.contextmanager
def held(found_inf: Tensor | None, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo what the block does to the tensors where `found_inf` is 1, without waiting for it; None undoes nothing.

    Sharded tensors are held by the process that has the part.
    """
    if found_inf is None:
        yield
        return
    parts = [(tensor.to_local() if is_sharded(tensor) else tensor).detach() for tensor in tensors]
    before = [part.clone() for part in parts]
    yield
    for part, old in zip(parts, before):
        torch.where(found_inf > 0, old, part, out=part)
