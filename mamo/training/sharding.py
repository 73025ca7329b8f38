"""The passes of a step with weights split over the processes (FSDP2).

Imported only by runs that shard: its libraries take a second to import.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mamo.config.schema import RunConfig
from mamo.distributed import all_reduce_sum, world_size
from mamo.models.layers import forward_layers
from mamo.training.parallel import ForwardRedirect, SingleProcess
from mamo.training.precision import DTYPES, cast_parameters

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
        self.scalars = [p for p in task.network.parameters() if p.ndim == 0 and p.requires_grad]
        self.whole = copy.deepcopy(task.network).to("cpu")  # to evaluate
        for layer in forward_layers(self.whole):
            vars(layer).pop("forward", None)
        names: dict[Tensor, str] = {parameter: name for name, parameter in task.network.named_parameters()}
        self.student = ForwardRedirect(task.network, task.losses)
        self._shard(self.student)
        self.losses = self.student
        if "teacher" in modules:
            teacher = ForwardRedirect(modules["teacher"], task.compute_targets)
            self._shard(teacher)
            self.compute_targets = teacher
        _move_optimizer(optimizer, names, dict(task.network.named_parameters()))

    def _shard(self, module: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (world_size(),))
        assert self.precision != "auto"
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.precision != "fp32":
            policy = MixedPrecisionPolicy(DTYPES[self.precision], torch.float32, cast_forward_inputs=False)
        for part in [*forward_layers(module), module]:
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=set(self.scalars))
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
            assert scalar.grad is not None
            scalar.grad = all_reduce_sum(scalar.grad)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the whole network in the run's precision; every process must enter."""
        tensors = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in self.task.network.state_dict().items()
        }
        self.whole.load_state_dict(tensors)
        self.whole.to(self.device)
        try:
            assert self.precision != "auto"
            with cast_parameters(self.precision, [self.whole]):
                yield self.whole
        finally:
            self.whole.to("cpu")


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
