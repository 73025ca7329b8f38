"""Optimizer and learning-rate schedule."""

import math

import torch
from torch import nn

from mamo.config import TrainingConfig


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and higher, decayed; vectors and scalars (biases, norms, temperature), not decayed."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in PyTorch's fused implementation."""
    groups = parameter_groups(network, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """Linear warm-up from 0, then cosine from `learning_rate` to `learning_rate_min` at the end; `step` is 0-based."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.total_steps - config.warmup_steps)
    share = (step - config.warmup_steps) / span
    low, high = config.learning_rate_min, config.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2
