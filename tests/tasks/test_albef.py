"""Agreement with the public ALBEF implementation: its weights, inputs, losses and gradients, computed by it once.

The whole file is found through MAMO_TEST_DATA (`albef/micro.pt`); `tests/fixtures/albef_micro.safetensors` is cut from
it, `albef_micro.json` says what and how.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamo.config import Config, build_config
from mamo.data.collate import PairBatch
from mamo.losses.mlm import mlm_loss
from mamo.models.albef import _views, load_albef
from mamo.models.cross_fusion import CrossFusion
from mamo.tasks.build import build_network
from mamo.tasks.pretrain import PretrainTask
from mamo.teacher import Teacher

FIXTURE = Path(__file__).parents[1] / "fixtures" / "albef_micro.safetensors"
MICRO = Path(os.environ.get("MAMO_TEST_DATA", "absent")) / "albef" / "micro.pt"
needs_micro = pytest.mark.skipif(not MICRO.is_file(), reason="MAMO_TEST_DATA names no folder with albef/micro.pt")
B, VOCABULARY = 8, 400
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def config_of(alpha: float = 0.4, image_size_px: int = 64, **model: Any) -> Config:
    """The configuration that `micro.pt` was made with, in our words."""
    return build_config(
        {
            "output_dir": "unused",
            "data": {"image_size_px": image_size_px},
            "model": {
                "image": {"width": 96, "depth": 3, "heads": 3, "patch_size_px": 16},
                "text": {"width": 96, "heads": 3, "mlp_width": 384, "layers": 2},
                "fusion_layers": 2,
                "fusion_type": "cross",
                "itc_width": 256,
                **model,
            },
            "losses": {
                "weights": {"mim": 0, "mrm_image": 0, "mrm_text": 0},
                "queue_size": 64,
                "itm_pool_size": B,
                "itc_soft_target_alpha": alpha,
                "mlm_soft_target_alpha": alpha,
            },
            "training": {"batch_size_global": B},
        }
    )


def task_of(config: Config) -> PretrainTask:
    return PretrainTask(config, build_network(config, VOCABULARY, 0), lambda image: image)


def load(path: Path, task: PretrainTask) -> Any:
    return load_albef(path, task.network, task.teacher.module, task.teacher.mlm)


@pytest.fixture(scope="module")
def micro() -> dict[str, Any]:
    return torch.load(MICRO, weights_only=True)


def batch_of(micro: dict[str, Any], part: dict[str, Any]) -> PairBatch:
    """Its inputs, masks and negatives as a batch of ours."""
    is_masked = part["mlm_labels"] != -100
    count = is_masked.sum(dim=1)
    slots = torch.zeros(B, int(count.max()), dtype=torch.int64)
    for row in range(B):
        slots[row, : count[row]] = is_masked[row].nonzero()[:, 0]
    noise = torch.zeros(B, 2, B)  # that draws the negatives which were drawn there
    own = torch.arange(B)
    noise[own, 0, part["text_neg_idx_for_image"]] = 1e3
    noise[own, 1, part["image_neg_idx_for_text"]] = 1e3
    return PairBatch(
        image=micro["image"],
        input_ids=micro["input_ids"],
        is_valid=micro["attention_mask"].bool(),
        masked_input_ids=part["mlm_input_ids"],
        text_slots=slots,
        text_slot_is_valid=torch.arange(slots.shape[1]) < count[:, None],
        visible_patches=torch.zeros(B, 1, dtype=torch.int64),
        masked_patches=torch.zeros(B, 1, dtype=torch.int64),
        itm_noise=noise,
        image_id=own,
        caption_id=own + 100,
        sample_id=own,
    )


@needs_micro
def test_encoders_and_heads_equal_albefs(micro: dict[str, Any]) -> None:
    """Bug: a layer, norm or projection is swapped or shifted in the loader; another eps; cross-attention misplaced."""
    task, expected = task_of(config_of()), micro["outputs"]
    load(MICRO, task)
    network = task.network.eval()
    body, is_valid = network.backbone, micro["attention_mask"].bool()
    with torch.no_grad():
        image = body.image_encoder(micro["image"])
        text = body.text_encoder(micro["input_ids"], is_valid)
        fused = body.fusion(body.fusion.embed_image(image), text, is_valid)
        masked_text = body.text_encoder(micro["mlm_input_ids"], is_valid)
        masked = body.fusion(body.fusion.embed_image(image), masked_text, is_valid)
        found = {
            "image_embeds": image,
            "text_embeds": text,
            "image_feat": body.image_feature(image),
            "text_feat": body.text_feature(text),
            "fusion_last_hidden_state": fused,
            "itm_logits": network.itm(fused[:, 0]),
            "mlm_logits_unmasked_input": network.mlm(fused.flatten(0, 1)).unflatten(0, (B, -1)),
            "mlm_logits": network.mlm(masked.flatten(0, 1)).unflatten(0, (B, -1)),
        }
        labels = micro["mlm_labels"]
        found["mlm_loss"] = mlm_loss(found["mlm_logits"][labels >= 0], labels[labels >= 0], int((labels >= 0).sum()))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


@needs_micro
@pytest.mark.parametrize("name", ["train_alpha0", "train_alpha04"])
def test_a_training_step_equals_albefs(micro: dict[str, Any], name: str) -> None:
    """Bug: any of the three losses, a soft target, the teacher, the queue or a gradient differs from ALBEF's."""
    part = micro[name]
    task = task_of(config_of(part["alpha"]))
    load(MICRO, task)
    network, batch = task.network.eval(), batch_of(micro, part)
    state, past = micro["state_dict"], torch.arange(64)
    task.queue.push(state["image_queue"].T, state["text_queue"].T, 1000 + past, 2000 + past)
    # ALBEF moves the teacher before the step, which is after the last one; this is its first
    task.teacher.update(network.backbone, 0.995, network.mlm)
    teacher = task.teacher.module
    torch.testing.assert_close(teacher.image_projection.weight, part["vision_proj_m_weight_after"], **CLOSE)

    targets, _ = task.prepare(batch, B, step=0)
    torch.testing.assert_close(targets.image_feature, part["image_feat_m"], **CLOSE)
    torch.testing.assert_close(targets.text_feature, part["text_feat_m"], **CLOSE)
    losses, _ = task.losses(batch, targets, 0)
    for ours, theirs in (("itc", "loss_ita"), ("itm", "loss_itm"), ("mlm", "loss_mlm")):
        torch.testing.assert_close(losses[ours], part[theirs], **CLOSE, msg=lambda text, n=ours: f"{n}: {text}")
    torch.stack(list(losses.values())).sum().backward()
    gradients = gradients_by_albefs_names(task)
    assert gradients.keys() == part["grad_norm"].keys()
    for key, norm in part["grad_norm"].items():
        assert float(gradients[key].norm()) == pytest.approx(float(norm), rel=1e-4, abs=1e-6), key
    for key, gradient in part["grad"].items():
        torch.testing.assert_close(
            gradients[key], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=key: f"{n}: {text}"
        )

    task.after_step(batch, targets, step=0)
    assert int(task.queue.position) == int(part["queue_ptr_after"])
    torch.testing.assert_close(task.queue.image_feature.T, part["image_queue_after"], **CLOSE)
    torch.testing.assert_close(task.queue.text_feature.T, part["text_queue_after"], **CLOSE)


def gradients_by_albefs_names(task: PretrainTask) -> dict[str, Tensor]:
    """The gradients seen as weights, which the loader knows by name."""
    network = task.network
    for parameter in network.parameters():
        parameter.data = parameter.grad
    views = _views(network.backbone, network.mlm) | {"temp": network.temperature.detach()}
    views |= {f"itm_head.{key}": value for key, value in network.itm.classifier.state_dict().items()}
    return {
        key.replace("text_encoder.", "text_encoder.bert.").replace("bert.cls", "cls"): v for key, v in views.items()
    }
