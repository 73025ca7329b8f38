"""Freeze the parameters that no loss reaches."""

from typing import TYPE_CHECKING

import torch

from mamo.data.collate import Batch

if TYPE_CHECKING:
    from mamo.tasks.base import Task  # below the tasks: for annotations


def freeze_unused_parameters(task: "Task", batch: Batch) -> str:
    """Run one backward pass and freeze every parameter that gets no gradient.

    Backbones are alike whatever the losses, so that one task can start from another's. What no loss of this task
    reaches (the projections without ITC, the fusion without a fused head) would otherwise train on weight decay only,
    and stop data-parallel training. No state moves and no random number is used up.

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
        losses, _ = task.losses(batch, targets, 0)
        total = torch.stack([task.weights[name] * value for name, value in losses.items()]).sum()
        if not total.requires_grad:
            raise ValueError(
                "training.parts: every parameter that a loss reaches is frozen; freeze less, or give a loss of another "
                "part a weight"
            )
        total.backward()  # type: ignore[no-untyped-call]
    network.train(was_training)
    counts: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        is_used = parameter.grad is not None
        parameter.requires_grad_(parameter.requires_grad and is_used)
        parameter.grad = None
        part = ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1])
        counts.setdefault(part, [0, 0])[int(not parameter.requires_grad)] += parameter.numel()
    return ", ".join(
        f"{part.removeprefix('backbone.')} {trainable:,}" + (f" (frozen {frozen:,})" if frozen else "")
        for part, (trainable, frozen) in counts.items()
    )
