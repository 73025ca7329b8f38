"""A network together with the processor of its images and texts."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mamo.data.processor import Processor


@dataclass(frozen=True, slots=True)
class Predictor:
    """A network on `device` with its processor."""

    network: Any
    """The task's network; it normalises uint8 images itself."""
    processor: Processor
    device: torch.device

    def with_network(self, network: nn.Module) -> "Predictor":
        """Return the same predictor with another copy of the network."""
        return replace(self, network=network)
