"""The momentum teacher: a frozen exponential moving average of the student."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from mamo.config.objective import TeacherConfig
from mamo.models.heads import MLMHead


def momentum_at(config: TeacherConfig, step: int, total_steps: int) -> float:
    """Return the momentum of the update after optimizer step `step` (0-based).

    `cosine` is 1 - (1 - m) * (cos(pi * step / total_steps) + 1) / 2, from m to 1 (BYOL's schedule).
    """
    if config.schedule == "constant":
        return config.momentum
    return 1 - (1 - config.momentum) * (math.cos(math.pi * step / total_steps) + 1) / 2


class Teacher(nn.Module):
    """Moving average of `student`: starts as a copy, moves by `update`, has no gradient and stays in eval mode.

    With `has_dropout` it stays in training mode instead, as ALBEF's does.

    `mlm` is a copy of the student's masked-word head, where its predictions are targets (momentum distillation). The
    parameters that the head shares with the student are shared between the copies, too.
    """

    def __init__(self, student: nn.Module, mlm: MLMHead | None = None, has_dropout: bool = False) -> None:
        super().__init__()
        self.has_dropout = has_dropout
        self.module: nn.Module
        self.mlm: MLMHead | None
        self.module, self.mlm = copy.deepcopy((student, mlm))  # in one call, so that shared parameters stay shared
        self.requires_grad_(False)
        self.eval()

    @property
    def backbone(self) -> Any:
        """The copy of the student's backbone."""
        return self.module

    @torch.no_grad()
    def copy_head(self, mlm: MLMHead) -> None:
        """Copy the masked-word head of a student, without the embeddings that it shares."""
        assert self.mlm is not None
        for mine, theirs in zip(self.mlm.bert_named_tensors().values(), mlm.bert_named_tensors().values()):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, where dropout is off: in the targets it would be noise. See `has_dropout`."""
        return super().train(self.has_dropout)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, mlm: MLMHead | None = None) -> None:
        """Move the teacher to momentum * teacher + (1 - momentum) * student. Call once per optimizer step.

        `mlm` is the student's masked-word head; a teacher without one ignores it.
        """
        source = nn.ModuleList([student] if self.mlm is None or mlm is None else [student, mlm])
        mine: list[Tensor] = list(self.parameters())
        theirs: list[Tensor] = list(source.parameters())
        assert len(mine) == len(theirs)
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        for my_buffer, their_buffer in zip(self.buffers(), source.buffers()):
            my_buffer.copy_(their_buffer)
