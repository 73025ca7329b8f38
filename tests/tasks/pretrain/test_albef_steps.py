"""Eight optimizer steps of ALBEF's config beside a plain loop with PyTorch's AdamW, in float64."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mamo.config.shipped import config_folder
from mamo.config.values import merge, read_values
from mamo.data.images import BadSamplePolicy
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.registry import build_config
from mamo.training.loop import Loop
from mamo.training.monitors import LossMonitor
from mamo.training.optim import make_optimizer
from tests.tasks.pretrain.naive_step import B, make, tiny

STEPS, POOL, QUEUE = 8, 4, 16


def config_of(name: str) -> Any:
    """A shipped config's losses and training on a tiny network: two epochs of four steps."""
    shipped = read_values(next(config_folder("pretrain").glob(f"{name}.yaml")))
    values = tiny(("itc", "itm", "mlm"), fusion_type="cross").model_dump()
    kept = {key: shipped[key] for key in ("masking", "losses", "teacher", "training")}
    ramps = {f"{loss}_soft_target_ramp_steps": 4 for loss in ("itc", "mlm")}
    small = {"losses": {"queue_size": QUEUE, "itm_pool_size": POOL, **ramps}}
    small["training"] = {"total_steps": 8, "epoch_steps": 4, "warmup_steps": 2, "batch_size_global": B}
    small["training"] |= {"micro_batch_size": None, "precision": "fp32", "learning_rate": 1e-2, "weight_decay": 0.1}
    return build_config(merge(merge(values, kept), small))


def rate_of(step: int) -> float:
    """ALBEF's: set after steps 0, 1 and 2 of the warm-up, and at the start of the second epoch."""
    low, high = 1e-5, 1e-2
    stair = [0, 0, 10, 20][step] / 20 if step < 4 else (1 + math.cos(math.pi / 2)) / 2
    return low + (high - low) * stair


def albef_losses(network: Any, teacher: Any, mlm_m: Any, queues: list[Tensor], batch: PairBatch, alpha: float) -> Any:
    """Return ITC + ITM + MLM of one batch, and the teacher's features."""
    body, valid = network.backbone, batch.is_valid
    image, text = body.image_encoder(batch.image), body.text_encoder(batch.input_ids, valid)
    features = [body.image_feature(image), body.text_feature(text)]
    with torch.no_grad():
        image_m, text_m = teacher.image_encoder(batch.image), teacher.text_encoder(batch.input_ids, valid)
        features_m = [teacher.image_feature(image_m), teacher.text_feature(text_m)]
        masked_m = teacher.text_encoder(batch.masked_input_ids, valid)
        soft = mlm_m(teacher.fusion(teacher.fusion.embed_image(image_m), masked_m, valid)).softmax(dim=-1)
    itc, similarities = [], []
    for side in (0, 1):
        candidates = torch.cat([features_m[1 - side], queues[1 - side]])
        similarity = features[side] @ candidates.T / network.temperature
        with torch.no_grad():
            opinion = (features_m[side] @ candidates.T / network.temperature).softmax(dim=1)
            target = alpha * opinion + (1 - alpha) * torch.eye(B, len(candidates), dtype=opinion.dtype)
        itc.append(-(similarity.log_softmax(dim=1) * target).sum(dim=1).mean())
        similarities.append(features[side].detach() @ features[1 - side].detach().T / network.temperature.detach())
    others = []
    for side in (0, 1):
        drawn = torch.full((B, B), -torch.inf, dtype=torch.float64)
        for first in range(0, B, POOL):
            rows = slice(first, first + POOL)
            drawn[rows, rows] = similarities[side][rows, rows] + batch.itm_noise[rows, side]
        others.append(drawn.fill_diagonal_(-torch.inf).argmax(dim=1))
    own = torch.arange(B)
    images, texts = torch.cat([own, own, others[1]]), torch.cat([own, others[0], own])
    fused = body.fusion(body.fusion.embed_image(image[images]), text[texts], valid[texts])
    itm = functional.cross_entropy(network.itm(fused[:, 0]), (torch.arange(3 * B) < B).long())
    masked = body.text_encoder(batch.masked_input_ids, valid)
    logits = network.mlm(body.fusion(body.fusion.embed_image(image), masked, valid))
    rows = torch.arange(B)[:, None].expand_as(batch.text_slots)[batch.text_slot_is_valid]
    slots = batch.text_slots[batch.text_slot_is_valid]
    chosen, labels = logits[rows, slots], batch.input_ids[rows, slots]
    mlm = (1 - alpha) * functional.cross_entropy(chosen, labels)
    mlm = mlm - alpha * (chosen.log_softmax(dim=1) * soft[rows, slots]).sum(dim=1).mean()
    return sum(itc) / 2 + itm + mlm, features_m


@pytest.mark.parametrize("name", ["albef", "albef_scenes"])
def test_eight_steps_equal_a_plain_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: clipped gradients, a temperature that does not decay, another warm-up, an empty queue, other negatives."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    config = config_of(name)
    task, batch = make(config)
    with torch.no_grad():
        task.teacher.update(task.network.backbone, 0.0, task.network.mlm)
    for module in task.modules().values():
        module.double()
    network, (teacher, mlm_m) = copy.deepcopy(task.network), copy.deepcopy((task.teacher.module, task.teacher.mlm))
    queues = [task.queue.image_feature.clone(), task.queue.text_feature.clone()]
    torch.testing.assert_close(queues[0].norm(dim=1), torch.ones(QUEUE, dtype=torch.float64), atol=1e-6, rtol=0)
    assert int(task.queue.filled) == QUEUE
    optimizer = make_optimizer(task.network, config.training)
    policy = BadSamplePolicy()
    loop = Loop(config, task, optimizer, torch.device("cpu"), tmp_path, [], {}, {}, LossMonitor({}), policy)
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim != 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (0.9, config.training.adam_beta2)
    plain = torch.optim.AdamW(groups, lr=0.1, betas=betas, foreach=False)
    for step in range(STEPS):
        found = loop.read(loop.step(batch, step))
        assert found["learning_rate"] == pytest.approx(rate_of(step), rel=1e-12)
        alpha = 0.4 * min(1, step / 4)
        loss, features_m = albef_losses(network, teacher, mlm_m, queues, batch, alpha)
        assert sum(found[f"loss/{name}"] for name in ("itc", "itm", "mlm")) == pytest.approx(loss.item(), rel=1e-12)
        plain.zero_grad()
        loss.backward()
        for group in plain.param_groups:
            group["lr"] = rate_of(step)
        plain.step()
        with torch.no_grad():
            network.temperature.clamp_(0.001, 0.5)
            for mine, theirs in ((teacher, network.backbone), (mlm_m, network.mlm)):
                for parameter_m, parameter in zip(mine.parameters(), theirs.parameters()):
                    if mine is teacher or parameter is not network.mlm.decoder.weight:
                        m = config.teacher.momentum
                        parameter_m.copy_(m * parameter_m + (1 - m) * parameter)
            queues = [torch.cat([queue, new])[-QUEUE:] for queue, new in zip(queues, features_m)]
    assert found["gradient_norm"] > 1  # which clipping would cut
    for (key, ours), theirs in zip(task.network.named_parameters(), network.parameters(), strict=True):
        # a shift of all keys changes nothing: Adam steps on the rounding of a gradient of 0
        atol = 1e-9 if key.endswith(("qkv.bias", "key.bias", "key_value.bias")) else 1e-12
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


def test_the_teacher_drops_out_where_its_config_says_so() -> None:
    """Bug: a key that changes nothing, or dropout in the targets of every other run."""
    for has_dropout in (False, True):
        values = tiny(("itc", "itm"), fusion_type="cross").model_dump()
        task, batch = make(
            build_config(merge(values, {"model": {"dropout": 0.5}, "teacher": {"dropout": has_dropout}}))
        )
        task.network.train()
        first, second = (task.compute_targets(batch, B, 0)[0].views["text_feature"] for _ in range(2))
        assert torch.equal(first, second) == (not has_dropout)
