"""The passes of a step with weights split over the processes (FSDP2).

Imported only by runs that shard: its libraries take a second to import.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mamo.config.schema import RunConfig
from mamo.distributed import all_reduce_sum, rank, world_size
from mamo.models.layers import forward_layers
from mamo.training.guard import held
from mamo.training.parallel import ForwardRedirect, SingleProcess
from mamo.training.precision import DTYPES, Precision, cast_parameters

if TYPE_CHECKING:
    from mamo.tasks.base import Task  # below the tasks: for annotations


class FSDP(SingleProcess):
    """FSDP2: weights, gradients and optimizer state of student and teacher are split over the processes.

    A layer's weights are gathered when it runs. The scalar temperature, which cannot be split, is replicated.
    """

    def __init__(self, config: RunConfig, task: "Task", optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(config, task)
        modules = task.modules()
        self.device = device
        self.scalars = [p for p in task.network.parameters() if p.ndim == 0]
        self.whole = copy.deepcopy(task.network).to("cpu")  # to evaluate
        for layer in forward_layers(self.whole):
            vars(layer).pop("forward", None)
        names: dict[Tensor, str] = {parameter: name for name, parameter in task.network.named_parameters()}
        self.student = ForwardRedirect(task.network, task.losses)
        self._shard(self.student, config.training.reshard_after_forward)
        self.losses = self.student
        if "teacher" in modules:
            teacher = ForwardRedirect(modules["teacher"], task.compute_targets)
            self._shard(teacher, True)  # no backward pass would free its weights
            self.compute_targets = teacher
        _move_optimizer(optimizer, names, dict(task.network.named_parameters()))

    def _shard(self, module: nn.Module, reshards: bool) -> None:
        mesh = init_device_mesh(self.device.type, (world_size(),))
        assert self.precision != "auto"
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.precision != "fp32":
            policy = MixedPrecisionPolicy(DTYPES[self.precision], torch.float32, cast_forward_inputs=False)
        for part in [*reversed(forward_layers(module)), module]:  # a layer within another one before it
            fully_shard(
                part,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=reshards,
                ignored_params=set(self.scalars),
            )
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)  # a sum instead of FSDP's average
            part.set_force_sum_reduction_for_comms(True)  # the only one that gloo knows

    def precision_context(self) -> AbstractContextManager[None]:
        """Return nothing to do: the sharding policy rounds the weights as it gathers them."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """See `SingleProcess`."""
        assert isinstance(self.student, FSDPModule)
        self.student.set_requires_gradient_sync(enabled)
        yield

    def reduce_remaining_gradients(self) -> None:
        """Sum the gradients of the scalars."""
        for scalar in self.scalars:
            if scalar.requires_grad:
                assert scalar.grad is not None
                scalar.grad = all_reduce_sum(scalar.grad)

    @contextlib.contextmanager
    def evaluating(self, precision: Precision | None = None) -> Iterator[nn.Module]:
        """Yield the whole network in a precision, by default the run's; every process must enter."""
        self.whole.load_state_dict(_gathered(self.task.network))
        if self.task.averaged_backbone is not None:
            self.whole.get_submodule("backbone").load_state_dict(_gathered(self.task.averaged_backbone))
        self.whole.to(self.device)
        try:
            assert self.precision != "auto"
            with cast_parameters(precision or self.precision, [self.whole]):
                yield self.whole
        finally:
            self.whole.to("cpu")


def _gathered(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with whole tensors."""
    state = module.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def _move_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], sharded: Mapping[str, nn.Parameter]
) -> None:
    """Let the optimizer move the sharded parameters, its state split like them."""
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    for parameter, state in list(optimizer.state.items()):
        del optimizer.state[parameter]
        new = sharded[names[parameter]]
        optimizer.state[new] = {key: _split_like(new, value) for key, value in state.items()}


def _split_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


# ---- Muon of sharded matrices ---------------------------------------------------------------------------------------


@torch.no_grad()
def sharded_muon_step(muon: torch.optim.Muon, found_inf: Tensor | None = None) -> None:
    """Take the step of `muon` on matrices whose rows are split over the processes.

    Every process moves its rows of the momentum. Each matrix has one owner, which gathers the update, orthogonalises it
    and scatters it again; the owners' shares of the work are alike. Equal to the step of one process up to rounding.
    Where `found_inf` is 1, nothing moves.
    """
    for group in muon.param_groups:
        taken = [matrix for matrix in group["params"] if matrix.grad is not None]
        owners = balanced_owners([_muon_operations(matrix.shape) for matrix in taken], world_size())
        updates = [_momentum_update(muon, group, matrix, found_inf) for matrix in taken]
        whole = [_gather_rows(update, matrix.shape, owner) for update, matrix, owner in zip(updates, taken, owners)]
        steps = [update if update is None else _orthogonal_step(update, group) for update in whole]
        for matrix, step, owner in zip(taken, steps, owners):
            rows = matrix.to_local()
            with held(found_inf, [rows]):
                rows.mul_(1 - group["lr"] * group["weight_decay"])
                rows.add_(_scatter_rows(step, rows, matrix.shape, owner))


def balanced_owners(operations: Sequence[int], count: int) -> list[int]:
    """Return an owner in [0, count) for each piece of work: the largest first, each to whom has the least so far."""
    loads, owners = [0] * count, [0] * len(operations)
    for index in sorted(range(len(operations)), key=lambda index: -operations[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += operations[index]
    return owners


def _muon_operations(shape: torch.Size) -> int:
    """Return a number proportional to the operations of the orthogonalisation: two products of the short side's square
    and one of the whole matrix for each iteration."""
    short, long = sorted(shape)
    return short * short * (2 * long + short)


def _momentum_update(muon: torch.optim.Muon, group: dict[str, Any], matrix: Tensor, found_inf: Tensor | None) -> Tensor:
    """Move this process's rows of the momentum; return its rows of the matrix to orthogonalise."""
    assert isinstance(matrix, DTensor)
    assert isinstance(matrix.grad, DTensor)
    state = muon.state[matrix]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(matrix.grad, memory_format=torch.preserve_format)
    gradient, momentum = matrix.grad.to_local(), state["momentum_buffer"].to_local()
    with held(found_inf, [momentum]):
        momentum.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()


def _gather_rows(rows: Tensor, shape: torch.Size, owner: int) -> Tensor | None:
    """Return the whole matrix in the process `owner`, None in the others."""
    padded = _pad(rows, shape)
    parts = [torch.empty_like(padded) for _ in range(world_size())] if rank() == owner else None
    dist.gather(padded, parts, dst=owner)
    return None if parts is None else torch.cat(parts)[: shape[0]]


def _scatter_rows(whole: Tensor | None, rows: Tensor, shape: torch.Size, owner: int) -> Tensor:
    """Return this process's rows of the matrix that `owner` holds; `rows` has their number and type."""
    received = torch.empty_like(_pad(rows, shape))
    parts = None
    if whole is not None:
        padded = whole.new_zeros(len(received) * world_size(), shape[1])
        padded[: shape[0]] = whole
        parts = list(padded.chunk(world_size()))
    dist.scatter(received, parts, src=owner)
    return received[: len(rows)]


def _pad(rows: Tensor, shape: torch.Size) -> Tensor:
    """Pad a process's rows to the number that all have in a collective."""
    length = -(-shape[0] // world_size())
    return torch.cat([rows, rows.new_zeros(length - len(rows), shape[1])]) if len(rows) < length else rows.contiguous()


def _orthogonal_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the step of PyTorch's Muon whose matrix to orthogonalise is `update`: from zero, without momentum."""
    zero = nn.Parameter(torch.zeros_like(update))
    zero.grad = update
    same = {key: group[key] for key in ("lr", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")}
    torch.optim.Muon([zero], weight_decay=0.0, momentum=0.0, nesterov=False, **same).step()  # type: ignore[no-untyped-call]
    return zero.detach()
