"""One training step of every task and of every shipped config: what it computes, and what it moves."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamo.config.shipped import config_folder
from mamo.config.values import merge, read_values
from mamo.data.loader import collate_range
from mamo.tasks.base import Task
from mamo.tasks.objective import Loss, Part
from mamo.tasks.registry import TASKS, build_config, build_task
from mamo.trainer import TrainingRun
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of, values_of

Calls = dict[str, int]
SHIPPED = sorted(path for folder in ("pretrain", "finetune") for path in config_folder(folder).glob("*.yaml"))
TEACHER_ENCODERS = {"teacher image": 1, "teacher text": 1}
MAMO: Calls = {**TEACHER_ENCODERS, "teacher fusion": 1, "image": 2, "text": 1, "fusion": 3}
ALBEF: Calls = {**TEACHER_ENCODERS, "teacher fusion": 1, "image": 1, "text": 1, "fusion": 2}
RETRIEVAL: Calls = {**TEACHER_ENCODERS, "image": 1, "text": 1, "fusion": 1}
ONE_PASS: Calls = {"image": 1, "text": 1, "fusion": 1}
MLIM: Calls = {"stream": 1}
EXPECTED: Mapping[str, Calls] = {  # counted in version 0.1.0, whose tasks chose their passes by hand
    **dict.fromkeys(["paper", "pairs", "scenes", "scenes_1h", "pretrain/nlvr", "emoji", "emoji_vit"], MAMO),
    **dict.fromkeys(["albef", "albef_scenes"], ALBEF),
    **dict.fromkeys(["retrieval_coco", "retrieval_flickr30k", "retrieval_scenes", "refcoco+", "boxes"], RETRIEVAL),
    "grounding_scenes": {**RETRIEVAL, "text": 2},  # the foils
    **dict.fromkeys(
        [
            "vqa2",
            "vqa_scenes",
            "questions",
            "nlvr2",
            "nlvr2_scenes",
            "sentences",
            "finetune/nlvr",
            "snli_ve",
            "entailment_scenes",
        ],
        ONE_PASS,
    ),
    **dict.fromkeys(["mlim_paper", "mlim_scenes", "closely_matching_scenes"], MLIM),
}


def shrunk(path: Path) -> dict[str, Any]:
    """Return a shipped config's values with tiny sizes, on scenes."""
    values = read_values(path)
    tiny = values_of(values.get("task", "pretrain"))
    model = dict(tiny["model"])
    if "fusion_type" in values.get("model", {}):
        model["fusion_type"] = values["model"]["fusion_type"]
    losses = {**values["losses"], "itm_pool_size": 4} if "losses" in values else None
    if losses is not None and "queue_size" in losses:
        losses["queue_size"] = 16
    kept = {key: value for key, value in values.items() if key in ("task", "masking", "vqa", "teacher")}
    shrunk = {**tiny, **kept, "model": model, **({} if losses is None else {"losses": losses})}
    return merge(shrunk, {"vqa": {"answer_min_count": 1}} if "vqa" in values else {})


def count_calls(task: Task) -> Calls:
    """Count the calls of encoders and fusion in one training step, by side and part."""
    calls: Counter[str] = Counter()

    def watch(owner: Any, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        setattr(owner, method, counted)

    sides = {"": task.network.backbone}
    modules = task.modules()
    if "teacher" in modules:
        sides["teacher "] = modules["teacher"].backbone
    for side, backbone in sides.items():
        if hasattr(backbone, "fusion"):
            watch(backbone.image_encoder, "encode", f"{side}image")
            watch(backbone.text_encoder, "forward", f"{side}text")
            watch(backbone.fusion, "fuse", f"{side}fusion")
        else:
            watch(backbone, "forward", f"{side}stream")
    batch = collate_range(task.train_dataset(), task.collator, range(8))
    targets, _ = task.compute_targets(batch, 8, 0)
    task.losses(batch, targets, 0)
    return dict(calls)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_step_of_a_shipped_config_computes_no_more_than_before(path: Path) -> None:
    """Bug: an image, a caption or a pair is encoded once for each loss that reads it."""
    expected = EXPECTED.get(path.stem) or EXPECTED[f"{path.parent.name}/{path.stem}"]
    assert count_calls(build_task(build_config(shrunk(path)), scenes_tokenizer())) == expected


class SameViews(Loss):
    """Reads what other losses of pre-training read."""

    name = "same_views"
    reads = ("image_feature", "text_feature", "fused_patches", "fused_words")
    targets = ("fused_patches", "fused_words")

    def __call__(self, network: Any, part: Part, n_global: Tensor, fixed: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a sum over the views."""
        return torch.stack([part.views[name].float().square().sum() for name in self.reads]).sum() / n_global, {}


def test_a_loss_that_reads_existing_views_adds_no_pass() -> None:
    """Bug: a loss from outside pays for passes that the step already has."""
    extra = config_of(losses={"extra": [f"{__name__}:SameViews"]})
    task = build_task(extra, scenes_tokenizer())
    assert "same_views" in task.weights
    assert count_calls(task) == count_calls(build_task(config_of(), scenes_tokenizer())) == MAMO


@pytest.mark.parametrize("name", TASKS)
def test_a_step_moves_every_trainable_tensor_and_no_other(name: str, tmp_path: Path) -> None:
    """Bug: a tensor that is trainable and that no loss, or no parameter group, reaches."""
    training = {"warmup_steps": 0, "learning_rate": 1e-2, "weight_decay": 0.0}
    run = TrainingRun(config_of(name, output_dir=str(tmp_path / "run"), training=training))
    before = {key: parameter.detach().clone() for key, parameter in run.task.network.named_parameters()}
    run.dry_run_loop("fp32", tmp_path).step(run.example_batch(8), 1)
    moved = {key for key, value in run.task.network.named_parameters() if not torch.equal(value, before[key])}
    trainable = {key for key, parameter in run.task.network.named_parameters() if parameter.requires_grad}
    # the softmax over keys does not see a shift that all keys share
    assert {key for key in trainable - moved if not key.endswith("key.bias")} == set()
    assert moved <= trainable
    assert len(trainable) > 10
