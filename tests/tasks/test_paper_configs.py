"""Fine-tuning configs of the paper's size: built without memory at full size, and one step of each at a reduced one."""

import json
import math
from pathlib import Path

import pytest
import torch

from mamo.config.values import merge, read_values
from mamo.models.image_encoder import ImageEncoder
from mamo.tasks.registry import build_config, build_task, finetune_config
from mamo.tasks.vqa.batch import ANSWERS
from mamo.trainer import TrainingRun
from mamo.world.vocabulary import scenes_tokenizer

FOLDER = Path(__file__).parents[2] / "configs" / "finetune"
OWN_FILES = [FOLDER / f"{name}.yaml" for name in ("boxes", "questions", "sentences")]  # for a user's data, small
FILES = sorted(
    path
    for path in FOLDER.glob("*.yaml")
    if "scenes" not in path.stem and path.stem != "nlvr" and path not in OWN_FILES
)
N_ANSWERS = 3129


def test_there_is_one_for_each_task() -> None:
    """Bug: a task that only scenes have."""
    tasks = {path.stem: read_values(path).get("task", "pretrain") for path in FILES}
    assert tasks == {
        "nlvr2": "reasoning", "refcoco+": "grounding", "retrieval_coco": "pretrain",
        "retrieval_flickr30k": "pretrain", "snli_ve": "entailment", "vqa2": "vqa",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_full_size_on_the_meta_device(path: Path, tmp_path: Path) -> None:
    """Bug: a size that does not fit (384 px, 24 x 24 patches), or a head that only tiny networks can have."""
    (tmp_path / ANSWERS).write_text(json.dumps([str(n) for n in range(N_ANSWERS)]))
    base = {"model": {"preset": "base", "image": {"name": "deit_base_patch16_224"}, "dropout": 0.1}}
    values = merge(base, read_values(path))
    with torch.device("meta"):
        task = build_task(build_config(values), scenes_tokenizer(), tmp_path)
    assert all(parameter.is_meta for parameter in task.network.parameters())
    backbone, width = task.network.backbone, 768
    assert backbone.fusion.grid == (24, 24)
    deit_base = 85_798_656 - 197 * width  # its published size without a classifier, less its 224 px positions
    assert sum(p.numel() for p in backbone.image_encoder.parameters()) == deit_base + (1 + 24 * 24) * width
    assert len(backbone.text_encoder.bert.encoder.layer) == len(backbone.fusion.layers) == 6
    if values.get("task") == "vqa":
        cross_and_self = sum(p.numel() for layer in task.network.answer.layers for p in layer.parameters())
        layer = 4 * (width * width + width) + 2 * width  # attention and its norm
        mlp = 2 * 4 * width * width + 5 * width + 2 * width
        assert cross_and_self == 6 * (2 * layer + mlp)
    steps = values["training"]["total_steps"] * values["training"]["batch_size_global"]
    epochs = {"retrieval_coco": (566_747, 5), "retrieval_flickr30k": (145_000, 10), "vqa2": (443_757, 8),
              "nlvr2": (86_373, 10), "snli_ve": (529_527, 5)}.get(path.stem)  # fmt: skip
    if epochs is not None:
        assert math.isclose(steps, math.prod(epochs), rel_tol=0.002)


@pytest.mark.parametrize("path", [*FILES, *OWN_FILES], ids=lambda path: path.stem)
def test_one_step_at_reduced_size(path: Path, pretrained: Path, tmp_path: Path) -> None:
    """Bug: a recipe whose keys contradict each other, or that does not start from a checkpoint of another size."""
    overrides = [
        f"checkpoint={pretrained}", f"output_dir={tmp_path / 'run'}", "data.source=scenes", "data.train_file=null",
        "data.eval_file=null", "data.image_size_px=24", "data.workers=0", "data.train_scenes=16",
        "training.batch_size_global=8", "training.micro_batch_size=4", "training.precision=fp32", "training.device=cpu",
    ]  # fmt: skip
    if "losses" in read_values(path):
        overrides += ["losses.itm_pool_size=4", "losses.queue_size=16"]
    if read_values(path).get("task") == "vqa":
        overrides += ["vqa.answer_min_count=1"]
    config = finetune_config(path, overrides, is_resume=False)
    run = TrainingRun(config)
    assert run.task.network.backbone.fusion.grid == (3, 3)
    (encoder,) = (part for part in run.task.network.modules() if isinstance(part, ImageEncoder))
    assert encoder is run.task.image_encoder
    before = run.task.network.backbone.fusion.layers[0].fc1.weight.clone()
    loop = run.dry_run_loop("fp32", tmp_path)
    values = loop.read(loop.step(run.example_batch(8), 1))
    assert all(math.isfinite(value) for value in values.values())
    assert not torch.equal(run.task.network.backbone.fusion.layers[0].fc1.weight, before)
