"""Freeze the parameters that no loss reaches."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamo.data.collate import Batch

if TYPE_CHECKING:
    from mamo.tasks.base import Task  # below the tasks: for annotations


def freeze_unused_parameters(task: "Task", batch: Batch) -> str:
    """Run one forward pass and freeze every parameter that no loss depends on, by the graph of the backward pass.

    Backbones are alike whatever the losses, so that one task can start from another's. What no loss of this task
    reaches (the projections without ITC, the fusion without a fused head) would otherwise train on weight decay only,
    and stop data-parallel training. No state moves and no random number is used up. Activations are not kept, so that
    the pass needs less memory than a step, also one with checkpointing.

    Args:
        task: its network is in its final place, and not yet compiled, wrapped or split.
        batch: some samples, at least `task.unit` of them, on the network's device.

    Returns:
        The numbers of trainable and frozen parameters of each part, in a line.

    Raises:
        ValueError: every parameter that a loss reaches is frozen already.
    """
    network = task.network
    was_training = network.training
    with torch.random.fork_rng(devices=[batch.image.device] if batch.image.is_cuda else []):
        network.train()
        targets, _ = task.compute_targets(batch, len(batch), 0)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse_backward):
            losses, _ = task.losses(batch, targets, 0)
        total = torch.stack([task.weights[name] * value for name, value in losses.items()]).sum()
        if not total.requires_grad:
            raise ValueError(
                "training.parts: every parameter that a loss reaches is frozen; freeze less, or give a loss of another "
                "part a weight"
            )
    used = leaves_of(total)
    network.train(was_training)
    counts: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter in used)
        part = ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1])
        counts.setdefault(part, [0, 0])[int(not parameter.requires_grad)] += parameter.numel()
    return ", ".join(
        f"{part.removeprefix('backbone.')} {trainable:,}" + (f" (frozen {frozen:,})" if frozen else "")
        for part, (trainable, frozen) in counts.items()
    )


def leaves_of(total: Tensor) -> set[Tensor]:
    """Return the leaves that a backward pass from `total` would reach."""
    found: set[Tensor] = set()
    seen: set[object] = set()
    waiting: list[Any] = [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def _refuse_backward(_: object) -> Tensor:
    raise AssertionError("no activation was kept for a backward pass")
