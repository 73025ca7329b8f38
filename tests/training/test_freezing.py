"""Which parameters are frozen, against the rule spelled out, in every combination of losses, masking and fusion."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mamo.data.loader import collate_range
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import build_task
from mamo.training.freezing import freeze_unused_parameters
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of

LOSS_NAMES = ("itc", "itm", "mlm", "mim", "mrm_image", "mrm_text")
FUSED = {"itm", "mlm", "mim", "mrm_image", "mrm_text"}
SIZES: dict[str, Any] = {
    "image": {"width": 8},
    "text": {"width": 8, "mlp_width": 8},
    "itc_width": 4,
    "dropout": 0.0,
}


def is_frozen(name: str, losses: set[str], mode: str) -> bool:
    """The rule: what no loss reaches. `name` is that of a parameter."""
    if name.startswith(("backbone.image_projection.", "backbone.text_projection.")):
        return "itc" not in losses
    if not name.startswith("backbone.fusion."):
        return False
    if name == "backbone.fusion.mask_token":
        reads_masked_image = {"mim", "mrm_image"} | ({"mlm", "mrm_text"} if mode == "joint" else set())
        return not losses & reads_masked_image
    return not losses & FUSED


def subsets(names: tuple[str, ...]) -> Iterator[set[str]]:
    for size in range(1, len(names) + 1):
        yield from map(set, itertools.combinations(names, size))


def task_of(losses: set[str], mode: str, fusion_type: str) -> PretrainTask:
    config = config_of(
        model={**SIZES, "fusion_type": fusion_type},
        masking={"mode": mode},
        losses={"weights": {name: float(name in losses) for name in LOSS_NAMES}, "queue_size": 0, "itm_pool_size": 2},
    )
    task = build_task(config, scenes_tokenizer())
    assert isinstance(task, PretrainTask)
    return task


def batch_of(task: PretrainTask, size: int = 2) -> Any:
    return collate_range(task.train_dataset(), task.collator, range(size))


@pytest.mark.parametrize("mode", ["alternate", "joint"])
@pytest.mark.parametrize(
    ("fusion_type", "names"), [("concat", LOSS_NAMES), ("cross", ("itc", "itm", "mlm", "mrm_text"))]
)
def test_frozen_is_what_no_loss_reaches(mode: str, fusion_type: str, names: tuple[str, ...]) -> None:
    """Bug: a parameter only decays, which also stops data-parallel training; or one does not learn that should."""
    batch = batch_of(task_of({"itc"}, mode, fusion_type))
    for losses in subsets(names):
        task = task_of(losses, mode, fusion_type)
        freeze_unused_parameters(task, batch)
        frozen = {name for name, parameter in task.network.named_parameters() if not parameter.requires_grad}
        expected = {name for name, _ in task.network.named_parameters() if is_frozen(name, losses, mode)}
        assert frozen == expected, losses


def test_freezing_moves_nothing() -> None:
    """Bug: the pass that finds unused parameters leaves gradients, draws random numbers or moves the queue."""
    task = task_of(set(LOSS_NAMES), "alternate", "concat")
    batch = batch_of(task)
    task.network.backbone.image_encoder.requires_grad_(False)
    before = {name: copy.deepcopy(module.state_dict()) for name, module in task.modules().items()}
    random = torch.get_rng_state()
    task.network.eval()
    freeze_unused_parameters(task, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert not task.network.training
    assert all(parameter.grad is None for parameter in task.network.parameters())
    assert not any(parameter.requires_grad for parameter in task.network.backbone.image_encoder.parameters())
    for name, module in task.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[name][key]), f"{name}.{key}"
