import math

import pytest
import torch
from torch import nn

from mamo.training.parallel import clip_gradients


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_gradients_are_clipped_as_pytorch_clips(max_norm: float) -> None:
    """Bug: long gradients are not scaled where the factor is left out, or short ones are."""
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    gradients = [torch.randn_like(p) for p in network.parameters()]
    found = []
    for clip in (clip_gradients, lambda network, norm: nn.utils.clip_grad_norm_(network.parameters(), norm)):
        for p, gradient in zip(network.parameters(), gradients):
            p.grad = gradient.clone()
        found.append([clip(network, max_norm), *(p.grad for p in network.parameters())])
    for one, other in zip(*found):
        assert torch.equal(one, other)
    assert torch.equal(found[0][1], gradients[0]) == (max_norm > 0.5)
