"""The momentum teacher: a frozen exponential moving average of the student."""

import copy
import math

import torch
from torch import Tensor, nn

from mamo.config import TeacherConfig


def momentum_at(config: TeacherConfig, step: int, total_steps: int) -> float:
    """Momentum of the update that follows optimizer step `step` (0-based).

    `cosine`: 1 - (1 - m) * (cos(pi * step / total_steps) + 1) / 2, from m to 1 (BYOL's schedule).
    """
    if config.schedule == "constant":
        return config.momentum
    return 1 - (1 - config.momentum) * (math.cos(math.pi * step / total_steps) + 1) / 2


class Teacher(nn.Module):
    """A copy of `student` that starts equal, follows by `update`, has no gradient and stays in eval mode."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Always eval: dropout in the targets would be noise."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student; call once per optimizer step."""
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        for my_buffer, their_buffer in zip(self.module.buffers(), student.buffers()):
            my_buffer.copy_(their_buffer)
