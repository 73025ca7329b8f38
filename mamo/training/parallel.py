"""The passes of a step over processes: plainly or replicated (DDP); sharded in `mamo.training.sharding`.

Losses are shares of the global batch, so gradients over processes are summed, never averaged.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mamo.config.schema import RunConfig, TrainingConfig
from mamo.distributed import all_reduce_sum, is_sharded, world_size
from mamo.models.layers import forward_layers
from mamo.training.guard import reads_late
from mamo.training.precision import Precision, cast_parameters

if TYPE_CHECKING:
    from mamo.tasks.base import Task  # below the tasks: for annotations

COMPILED_VARIANTS = 64
"""Shapes and modes for which one kind of layer may be compiled before it runs uncompiled."""


def local_batch_sizes(training: TrainingConfig, unit: int = 1, unit_key: str = "") -> tuple[int, int]:
    """Return a process's samples in an optimizer step, and in a forward pass.

    Args:
        training: the global batch and the micro-batch.
        unit: consecutive samples that must share a forward pass, as a pool of ITM negatives.
        unit_key: the config key that sets `unit`.

    Raises:
        ValueError: they do not divide, or a unit would straddle two processes or forward passes.
    """
    world = world_size()
    share, rest = divmod(training.batch_size_global, world)
    if rest:
        raise ValueError(
            f"training.batch_size_global: {training.batch_size_global} does not divide by {world} processes"
        )
    micro = min(training.micro_batch_size or share, share)
    if share % micro:
        raise ValueError(
            f"training.micro_batch_size: {micro} does not divide the {share} samples of each of {world} processes "
            f"(training.batch_size_global {training.batch_size_global})"
        )
    if micro % unit:
        raise ValueError(
            f"{unit_key}: {unit} does not divide the {micro} samples of a forward pass "
            f"(training.batch_size_global {training.batch_size_global}, {world} processes, training.micro_batch_size "
            f"{training.micro_batch_size}); such a group of samples must not straddle processes"
        )
    return share, micro


def apply_compile_and_checkpointing(training: TrainingConfig, modules: Mapping[str, nn.Module]) -> None:
    """Compile the layers of all modules and checkpoint those of the student, as configured; parameter names stay.

    Raises:
        ValueError: either is configured, and a layer has no `forward`.
    """
    if not (training.compile or training.activation_checkpointing):
        return
    if training.compile:
        torch._dynamo.config.recompile_limit = max(COMPILED_VARIANTS, torch._dynamo.config.recompile_limit)
    for name, module in modules.items():
        for layer in forward_layers(module):
            if training.compile:
                layer.forward = torch.compile(layer.forward)
            if training.activation_checkpointing and name == "student":
                layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)


class SingleProcess:
    """The passes as the task has them."""

    def __init__(self, config: RunConfig, task: "Task") -> None:
        self.task = task
        self.precision = config.training.precision
        self.compute_targets, self.losses = task.compute_targets, task.losses

    def precision_context(self) -> AbstractContextManager[None]:
        """Return the precision of the run, for forward and backward passes."""
        assert self.precision != "auto"
        return cast_parameters(self.precision, self.task.modules().values())

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Enclose forward and backward of a micro-batch; gradients are summed over processes after the last one."""
        return contextlib.nullcontext()

    def reduce_remaining_gradients(self) -> None:
        """Sum what the engine did not."""

    @contextlib.contextmanager
    def evaluating(self, precision: Precision | None = None) -> Iterator[nn.Module]:
        """Yield the whole network in a precision, by default the run's; every process must enter."""
        network = self.task.network
        with (
            replaced_backbone(network, self.task.averaged_backbone),
            cast_parameters(precision, [network]) if precision else self.precision_context(),
        ):
            yield network


@contextlib.contextmanager
def replaced_backbone(network: nn.Module, other: nn.Module | None) -> Iterator[None]:
    """Let the network have the weights of another backbone, also where a head shares one; None changes nothing."""
    own = network.get_submodule("backbone").parameters() if other is not None else ()
    new = dict(zip(own, other.parameters() if other is not None else ()))
    owners = [
        (owner._parameters, name, parameter)
        for owner in network.modules()
        for name, parameter in owner._parameters.items()
        if parameter in new
    ]
    for parameters, name, parameter in owners:
        parameters[name] = new[parameter]
    try:
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter


class ForwardRedirect(nn.Module):
    """A method of the task as the forward pass of the module whose weights it reads: where DDP and FSDP set in."""

    def __init__(self, module: nn.Module, method: Callable[..., object]) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *arguments: object) -> object:
        """Call the method."""
        return self.method(*arguments)


class DDP(SingleProcess):
    """DDP: every process holds all weights; gradients are summed while the backward pass goes on."""

    def __init__(self, config: RunConfig, task: "Task") -> None:
        super().__init__(config, task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a name that older versions of PyTorch do not have
            self.replica = DistributedDataParallel(
                ForwardRedirect(task.network, task.losses), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.replica.register_comm_hook(None, _sum)  # instead of DDP's average
        self.losses = self.replica

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """See `SingleProcess`."""
        return contextlib.nullcontext() if enabled else self.replica.no_sync()


def _sum(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def clip_gradients(network: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a joint L2 norm of `max_norm`; returns the norm before, of the whole network.

    Infinity leaves them unchanged, and so does, on a CPU, a norm that is not above: a factor of 1 is not multiplied.
    """
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    sharded = [g.to_local() for g in gradients if is_sharded(g)]
    replicated = [g for g in gradients if not is_sharded(g)]
    norm = nn.utils.get_total_norm(replicated)
    if sharded:
        norm = (all_reduce_sum(nn.utils.get_total_norm(sharded).square()) + norm.square()).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch clips
    if not math.isinf(max_norm) and (reads_late(norm.device) or factor != 1):
        torch._foreach_mul_([*sharded, *replicated], factor)
    return norm


def scale_gradients(network: nn.Module, factor: Tensor) -> None:
    """Multiply all gradients, whole or sharded, by a scalar."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    torch._foreach_mul_([g.to_local() if is_sharded(g) else g for g in gradients], factor)
