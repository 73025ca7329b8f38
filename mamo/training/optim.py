"""Optimizer and learning-rate schedule."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mamo.config.schema import TrainingConfig
from mamo.config.values import Values
from mamo.distributed import is_sharded
from mamo.models.layers import transformer_layers
from mamo.training.guard import held


def parameter_groups(
    network: nn.Module,
    weight_decay: float,
    decays_scalars: bool = False,
    scales: Mapping[Tensor, float] | None = None,
) -> list[Values]:
    """Return two groups of parameters: decayed matrices, and vectors (biases, norms) without decay.

    Scalars, as the temperature, belong to the second group, or with `decays_scalars` to the first. Where parameters
    have `scales`, factors of the learning rate, there are two such groups for each factor, its `lr_scale`.
    """
    found: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for p in network.parameters():
        if p.requires_grad:
            decayed, plain = found.setdefault((scales or {}).get(p, 1.0), ([], []))
            (decayed if p.ndim >= 2 or (decays_scalars and p.ndim == 0) else plain).append(p)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for scale, (decayed, plain) in found.items()
        for params, decay in ((decayed, weight_decay), (plain, 0.0))
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group, times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def make_optimizer(
    network: nn.Module, config: TrainingConfig, scales: Mapping[Tensor, float] | None = None
) -> torch.optim.Optimizer:
    """Return PyTorch's fused AdamW over `parameter_groups`; with `optimizer: muon`, `MuonWithAdamW`."""
    groups = parameter_groups(network, config.weight_decay, config.decay_temperature, scales)
    if config.optimizer == "muon":
        optimizer: torch.optim.Optimizer = MuonWithAdamW(layer_matrices(network), groups, config)
    else:
        optimizer = _adamw(groups, config)
    set_learning_rate(optimizer, config.learning_rate)
    return optimizer


def layer_matrices(network: nn.Module) -> list[Tensor]:
    """Return the trainable weights of the linear maps in `transformer_layers`: no embeddings, projections or heads."""
    found = [
        module.weight
        for layer in transformer_layers(network)
        for module in layer.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    return list(dict.fromkeys(found))  # a layer within a layer


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) moves matrices by their orthogonalised momentum, AdamW everything else.

    Muon's steps are scaled to the root mean square of AdamW's (Moonlight, Liu et al. 2025), so that one learning rate
    and one weight decay serve both. Both are PyTorch's; their states lie in this optimizer's `state`.
    """

    def __init__(self, matrices: list[Tensor], groups: list[Values], config: TrainingConfig) -> None:
        taken = {id(matrix) for matrix in matrices}
        others = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        by_scale: dict[float, list[Tensor]] = {}
        for matrix in matrices:
            by_scale.setdefault(scales[id(matrix)], []).append(matrix)
        self.muon = torch.optim.Muon(
            [{"params": own, "lr_scale": scale} for scale, own in (by_scale or {1.0: []}).items()],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = _adamw(others, config)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]  # the very groups, not copies
        self.muon.state = self.adamw.state = self.state

    found_inf: Tensor | None = None
    """1 where a step moves nothing, without waiting for the device: as in PyTorch's fused AdamW. None: it moves."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter by its gradient."""
        matrices = [matrix for group in self.muon.param_groups for matrix in group["params"]]
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        is_emulated = bool(matrices) and matrices[0].device.type == "cpu" and not has_bf16_products()
        with RoundedProducts() if is_emulated else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            if any(map(is_sharded, matrices)):
                from mamo.training.sharding import sharded_muon_step  # here: its libraries take a second to import

                sharded_muon_step(self.muon, self.found_inf)
            else:
                moved = [] if self.found_inf is None else [*matrices, *self._momenta(matrices)]
                with held(self.found_inf, moved):
                    self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()

    def _momenta(self, matrices: list[Tensor]) -> list[Tensor]:
        """Return Muon's momenta of the matrices with a gradient; before the first step they are 0."""
        taken = [matrix for matrix in matrices if matrix.grad is not None]
        for matrix in taken:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        return [self.state[matrix]["momentum_buffer"] for matrix in taken]


def has_bf16_products() -> bool:
    """Say whether PyTorch has a fast bf16 matrix product for this CPU (AVX-512 or newer, or ARM's)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class RoundedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, bf16 matrix products are computed in fp32 and rounded once.

    That is the definition of a bf16 product with fp32 sums, up to the order of the sums. PyTorch's own product takes 20
    times as long on a CPU without bf16: Muon's iteration was two thirds of a step of the quick start.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and args[-1].dtype == torch.bfloat16:
            return func(*(factor.float() for factor in args), **kwargs).bfloat16()
        return func(*args, **kwargs)


def _adamw(groups: list[Values], config: TrainingConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """Warm up linearly from 0, then follow a cosine from `learning_rate` to `learning_rate_min`; `step` is 0-based.

    With `schedule: warmup-stable-decay` the rate stays at `learning_rate` until the last `decay_steps`, in which it
    falls in a line (Zhai et al. 2022, Hu et al. 2024).

    With `schedule: albef` the warm-up begins at `learning_rate_min` and has `WARMUP_STAIRS` stairs, of which the first
    is a step longer, as ALBEF sets the rate after a step; the cosine has a stair an epoch and begins with the run.
    """
    if config.schedule == "albef":
        return _albef_learning_rate(config, step)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    low, high = config.learning_rate_min, config.learning_rate
    if config.schedule == "warmup-stable-decay":
        left = config.total_steps - step
        return high if left >= config.decay_steps else low + (high - low) * left / config.decay_steps
    span = max(1, config.total_steps - config.warmup_steps)
    share = (step - config.warmup_steps) / span
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def is_same_schedule(one: TrainingConfig, other: TrainingConfig, n_steps: int) -> bool:
    """Say whether the first `n_steps` steps have the same learning rates in both."""
    return all(learning_rate_at(one, step) == learning_rate_at(other, step) for step in range(n_steps))


WARMUP_STAIRS = 20


def _albef_learning_rate(config: TrainingConfig, step: int) -> float:
    assert config.epoch_steps is not None
    low, high = config.learning_rate_min, config.learning_rate
    epoch, n_epochs = step // config.epoch_steps, math.ceil(config.total_steps / config.epoch_steps)
    if epoch == 0:
        stair = max(0, step - 1) * WARMUP_STAIRS // config.warmup_steps if config.warmup_steps else WARMUP_STAIRS
        return low + (high - low) * min(stair, WARMUP_STAIRS) / WARMUP_STAIRS
    return low + (high - low) * (1 + math.cos(math.pi * epoch / n_epochs)) / 2
