"""Agreement with the public ALBEF implementation: its weights, inputs, losses and gradients, computed by it once.

The whole file is found through MAMO_TEST_DATA (`albef/micro.pt`); `tests/fixtures/albef_micro.safetensors` is cut from
it, `albef_micro.json` says what and how.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mamo.config.schema import RunConfig
from mamo.losses.itc import itc_loss, itc_targets
from mamo.losses.itm import itm_loss
from mamo.losses.mlm import mlm_loss
from mamo.models.convert_albef import _views, load_albef
from mamo.models.cross_fusion import CrossFusion
from mamo.models.heads import ITMHead, MLMHead
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import build_config
from mamo.trainer import TrainingRun

FIXTURE = Path(__file__).parents[1] / "fixtures" / "albef_micro.safetensors"
MICRO = Path(os.environ.get("MAMO_TEST_DATA", "absent")) / "albef" / "micro.pt"
needs_micro = pytest.mark.skipif(not MICRO.is_file(), reason="MAMO_TEST_DATA names no folder with albef/micro.pt")
B, VOCABULARY = 8, 400
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def config_of(alpha: float = 0.4, image_size_px: int = 64, **model: Any) -> RunConfig:
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


class Words(list[int]):
    """As much of a tokenizer as a task reads when it is built."""

    pad_token_id, mask_token_id, all_special_ids = 0, 4, (0,)


def task_of(config: RunConfig) -> PretrainTask:
    return PretrainTask(config, Words(range(VOCABULARY)))


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
        caption_ids=own[:, None] + 100,
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

    targets, _ = task.compute_targets(batch, B, step=0)
    torch.testing.assert_close(targets.views["image_feature"], part["image_feat_m"], **CLOSE)
    torch.testing.assert_close(targets.views["text_feature"], part["text_feat_m"], **CLOSE)
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

    task.on_optimizer_step(batch, targets, step=0)
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


# ---- the part of it that is committed --------------------------------------------------------------------------------

LAYERS = "text_encoder.bert.encoder.layer."
WEIGHTS = (f"{LAYERS}2.", f"{LAYERS}3.", "itm_head.", "text_encoder.cls.predictions.transform.")
KEPT_ROWS = 2  # samples whose word logits are kept


def cut(micro: dict[str, Any]) -> dict[str, Tensor]:
    """What the fixture holds: fusion layers and heads, their inputs and outputs, features and queues for ITC."""
    state = micro["state_dict"]
    kept = {key: value for key, value in state.items() if key.startswith(WEIGHTS)}
    for key in (
        "temp",
        "image_queue",
        "text_queue",
        "text_encoder.cls.predictions.bias",
        "text_encoder.bert.embeddings.word_embeddings.weight",
    ):
        kept[key] = state[key]
    outputs = ("image_embeds", "text_embeds", "image_feat", "text_feat", "fusion_last_hidden_state", "itm_logits")
    kept |= {f"outputs/{key}": micro["outputs"][key] for key in outputs}
    kept["outputs/mlm_logits_unmasked_input"] = micro["outputs"]["mlm_logits_unmasked_input"][:KEPT_ROWS]
    kept["attention_mask"] = micro["attention_mask"]
    for name in ("train_alpha0", "train_alpha04"):
        part = micro[name]
        kept |= {f"{name}/{key}": part[key] for key in ("loss_ita", "loss_itm", "image_feat_m", "text_feat_m")}
        kept |= {f"{name}/{key}": part[key] for key in ("image_neg_idx_for_text", "text_neg_idx_for_image")}
        kept |= {f"{name}/grad/{key}": part["grad"][key] for key in ("temp", "itm_head.weight")}
    return {key: value.contiguous() for key, value in kept.items()}


@needs_micro
def test_the_fixture_is_cut_from_the_whole(micro: dict[str, Any]) -> None:
    """Bug: the fixture was made by something else than what its provenance says."""
    expected, found = cut(micro), load_file(FIXTURE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert json.loads(FIXTURE.with_suffix(".json").read_text())["meta"] == micro["meta"]


@pytest.fixture(scope="module")
def fixture() -> dict[str, Tensor]:
    return load_file(FIXTURE)


def parts_of(fixture: dict[str, Tensor]) -> tuple[CrossFusion, ITMHead, MLMHead]:
    fusion = CrossFusion(96, 2, 3, 384, image_width=96, grid=(4, 4), num_prefix_tokens=1).eval()
    words = torch.nn.Embedding.from_pretrained(fixture["text_encoder.bert.embeddings.word_embeddings.weight"])
    itm, mlm = ITMHead(96), MLMHead(96, words)
    named = [(layer.bert_named_tensors(), f"{LAYERS}{index}.") for index, layer in enumerate(fusion.layers, start=2)]
    named += [(itm.classifier.state_dict(), "itm_head."), (mlm.bert_named_tensors(), "text_encoder.cls.predictions.")]
    for views, prefix in named:
        for name, view in views.items():
            view.copy_(fixture[prefix + name])
    return fusion, itm, mlm


def test_fusion_and_heads_equal_albefs(fixture: dict[str, Tensor]) -> None:
    """Bug: cross-attention, its order, mask or scale, or a head differs from ALBEF's."""
    fusion, itm, mlm = parts_of(fixture)
    image, text = fusion.embed_image(fixture["outputs/image_embeds"]), fixture["outputs/text_embeds"]
    is_valid = fixture["attention_mask"].bool()
    fused = fusion(image, text, is_valid)
    torch.testing.assert_close(fused, fixture["outputs/fusion_last_hidden_state"], **CLOSE)
    torch.testing.assert_close(itm(fused[:, 0]), fixture["outputs/itm_logits"], **CLOSE)
    words = mlm(fused[:KEPT_ROWS].flatten(0, 1)).unflatten(0, (KEPT_ROWS, -1))
    torch.testing.assert_close(words, fixture["outputs/mlm_logits_unmasked_input"], **CLOSE)


@pytest.mark.parametrize("name", ["train_alpha0", "train_alpha04"])
def test_itm_loss_equals_albefs(fixture: dict[str, Tensor], name: str) -> None:
    """Bug: texts and images of the negatives exchanged, their validity not taken along, classes swapped."""
    fusion, itm, _ = parts_of(fixture)
    images = fusion.embed_image(fixture["outputs/image_embeds"])
    is_valid, own = fixture["attention_mask"].bool(), torch.arange(B)
    texts = fusion.embed_text(fixture["outputs/text_embeds"], is_valid)
    image_indices = torch.cat([own, own, fixture[f"{name}/image_neg_idx_for_text"]])
    text_rows = torch.cat([own, fixture[f"{name}/text_neg_idx_for_image"], own])
    cls = torch.zeros(3 * B, 1, dtype=torch.int64)
    logits = itm(fusion.fuse(images[image_indices], texts[text_rows], is_valid[text_rows], cls)[:, 0])
    loss = itm_loss(logits, torch.arange(3 * B) < B, torch.ones(3 * B, dtype=torch.bool), 3 * B)
    torch.testing.assert_close(loss, fixture[f"{name}/loss_itm"], **CLOSE)
    loss.backward()
    torch.testing.assert_close(itm.classifier.weight.grad, fixture[f"{name}/grad/itm_head.weight"], **CLOSE)


@pytest.mark.parametrize(("name", "alpha"), [("train_alpha0", 0.0), ("train_alpha04", 0.4)])
def test_itc_loss_equals_albefs(fixture: dict[str, Tensor], name: str, alpha: float) -> None:
    """Bug: soft targets over the batch alone, a gradient through them, or the temperature left out of one side."""
    temperature = fixture["temp"].clone().requires_grad_()
    own, nothing = torch.arange(B), torch.zeros(B, B + 64, dtype=torch.bool)
    terms = []
    for side, other in (("image", "text"), ("text", "image")):
        candidates = torch.cat([fixture[f"{name}/{other}_feat_m"], fixture[f"{other}_queue"].T])
        opinion = fixture[f"{name}/{side}_feat_m"] @ candidates.T / temperature.detach()
        similarity = fixture[f"outputs/{side}_feat"] @ candidates.T / temperature
        terms.append(itc_loss(similarity, itc_targets(opinion, own, nothing, alpha), nothing, B))
    loss = (terms[0] + terms[1]) / 2
    torch.testing.assert_close(loss, fixture[f"{name}/loss_ita"], **CLOSE)
    loss.backward()
    torch.testing.assert_close(temperature.grad, fixture[f"{name}/grad/temp"], **CLOSE)


# ---- the loader ------------------------------------------------------------------------------------------------------


def albef_file(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any] = lambda state: None) -> Path:
    """A checkpoint in ALBEF's layout, of a random network of ours, changed and written as theirs are."""
    task = task_of(config_of())
    torch.manual_seed(5)
    state: dict[str, Tensor] = {}
    for suffix, body, mlm in (
        ("", task.network.backbone, task.network.mlm),
        ("_m", task.teacher.module, task.teacher.mlm),
    ):
        for key, view in _views(body, mlm).items():
            first, _, rest = key.partition(".")
            rest = rest if first != "text_encoder" or rest.startswith("cls.") else f"bert.{rest}"
            state[f"{first}{suffix}.{rest}"] = torch.randn_like(view)
        words = state[f"text_encoder{suffix}.bert.embeddings.word_embeddings.weight"]
        state[f"text_encoder{suffix}.cls.predictions.decoder.weight"] = words
        state[f"text_encoder{suffix}.bert.embeddings.position_ids"] = torch.arange(512)[None]
    state |= {"itm_head.weight": torch.randn(2, 96), "itm_head.bias": torch.randn(2), "temp": torch.tensor(0.05)}
    state |= {
        "image_queue": torch.randn(256, 99),
        "text_queue": torch.randn(256, 99),
        "queue_ptr": torch.zeros(1).long(),
    }
    change(state)
    path = tmp_path / "ALBEF.pth"
    torch.save({"model": state, "epoch": 29, "config": {"alpha": 0.4}}, path)
    return path


def test_the_report_names_what_was_done(tmp_path: Path) -> None:
    """Bug: momentum weights land in the student, positions are not resampled, queues load silently."""
    path = albef_file(tmp_path)
    state = torch.load(path, weights_only=True)["model"]
    task = task_of(config_of(image_size_px=96))
    report = load(path, task)
    assert report.interpolated == ("visual_encoder.pos_embed", "momentum visual_encoder.pos_embed")
    assert report.new == ()
    assert set(report.unused) == {
        "image_queue", "text_queue", "queue_ptr",
        "text_encoder.embeddings.position_ids",
    }  # fmt: skip
    body, teacher = task.network.backbone, task.teacher.module
    assert torch.equal(body.text_projection.weight, state["text_proj.weight"])
    assert torch.equal(teacher.text_projection.weight, state["text_proj_m.weight"])
    assert torch.equal(teacher.image_encoder.vit.cls_token, state["visual_encoder_m.cls_token"])
    old = state["visual_encoder.pos_embed"]
    expected = torch.nn.functional.interpolate(
        old[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic"
    )
    torch.testing.assert_close(body.image_encoder.vit.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(body.image_encoder.vit.pos_embed[:, :1], old[:, :1])


def test_as_many_patches_in_another_arrangement_are_resampled(tmp_path: Path) -> None:
    """Bug: 4 x 4 stored positions pass for the 2 x 8 of wide images."""
    path = albef_file(tmp_path)
    task = task_of(config_of(image_size_px=[32, 128]))
    assert load(path, task).interpolated == ("visual_encoder.pos_embed", "momentum visual_encoder.pos_embed")
    old = torch.load(path, weights_only=True)["model"]["visual_encoder.pos_embed"]
    expected = torch.nn.functional.interpolate(
        old[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=(2, 8), mode="bicubic"
    )
    found = task.network.backbone.image_encoder.vit.pos_embed
    torch.testing.assert_close(found[:, 1:], expected.flatten(2).transpose(1, 2))


def test_positions_of_no_square_are_refused(tmp_path: Path) -> None:
    """Bug: a library's RuntimeError about a reshape instead of the tensor's name."""
    path = albef_file(tmp_path, lambda state: state.update({"visual_encoder.pos_embed": torch.zeros(1, 16, 96)}))
    with pytest.raises(ValueError, match=r"visual_encoder\.pos_embed is \[1, 16, 96\], must be \[1, 17, 96\]"):
        load(path, task_of(config_of()))


def test_a_retrieval_model_without_momentum_starts_the_teacher_as_the_student(tmp_path: Path) -> None:
    """Bug: fine-tuned files (no MLM head, no level `bert`) are refused, or leave a random teacher."""

    def as_fine_tuned(state: dict[str, Tensor]) -> None:
        for key in list(state):
            value = state.pop(key)
            if not key.partition(".")[0].endswith("_m") and ".cls." not in key:
                state[key.replace("text_encoder.bert.", "text_encoder.")] = value

    task = task_of(config_of())
    report = load(albef_file(tmp_path, as_fine_tuned), task)
    assert {name.rpartition(".")[0] for name in report.new} == {
        "text_encoder.cls.predictions.transform.dense",
        "text_encoder.cls.predictions.transform.LayerNorm",
        "text_encoder.cls.predictions",
    }
    theirs = task.teacher.module.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in task.network.backbone.state_dict().items())
    head = task.teacher.mlm.state_dict()
    assert all(torch.equal(value, head[name]) for name, value in task.network.mlm.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual_encoder.norm.bias"), r"missing visual_encoder\.norm\.bias"),
        (
            lambda s: s.pop("text_encoder_m.bert.encoder.layer.3.crossattention.self.key.bias"),
            r"missing .*self\.key\.bias",
        ),
        (
            lambda s: s.update({"text_encoder.bert.encoder.layer.4.output.dense.bias": torch.zeros(96)}),
            r"unused .*\.4\.",
        ),
        (lambda s: s.update({"text_decoder.bert.x": torch.zeros(1)}), r"unused text_decoder\.bert\.x"),
        (lambda s: s.update({"vision_proj.weight": torch.zeros(8, 96)}), r"vision_proj\.weight is \[8, 96\], must be"),
        (
            lambda s: s.update({"text_encoder.cls.predictions.decoder.weight": torch.zeros(400, 96)}),
            r"not an ALBEF file",
        ),
    ],
)
def test_the_loader_is_strict_and_touches_nothing_before_it_is_sure(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    """Bug: a half loaded network."""
    task = task_of(config_of())
    before = {
        name: value.clone() for name, module in task.modules().items() for name, value in module.state_dict().items()
    }
    with pytest.raises(ValueError, match=message):
        load(albef_file(tmp_path, change), task)
    for module in task.modules().values():
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a downloaded checkpoint is unpickled."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ALBEF.pth"
    torch.save({"model": {"temp": torch.ones(())}, "config": Malicious()}, path)
    with pytest.raises(ValueError, match="contains a pickled object other than tensors"):
        load(path, task_of(config_of()))
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="contains a pickled object other than tensors"):
        load(path, task_of(config_of()))
    assert not (tmp_path / "executed").exists()


def test_concatenated_fusion_is_refused() -> None:
    """Bug: cross-attention weights are dropped and the fusion stays random."""
    with pytest.raises(ValueError, match=r"need model\.fusion_type: cross"):
        load(Path("absent"), task_of(config_of(fusion_type="concat")))


def test_a_run_starts_from_an_albef_file(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: `checkpoint: ALBEF.pth` is taken for a folder, or the run's lineage does not tell of it."""
    losses = {"weights": {"mim": 0, "mrm_image": 0, "mrm_text": 0}, "mlm_soft_target_alpha": 0.4}
    cross = {"fusion_type": "cross", "fusion_layers": 1}
    run = TrainingRun(tiny(model=cross, losses=losses))
    network, state = run.task.network, {}
    for key, view in (_views(network.backbone, network.mlm) | {"temp": network.temperature.detach()}).items():
        state[key] = torch.randn_like(view)
    state |= {"itm_head.weight": torch.randn(2, 32), "itm_head.bias": torch.randn(2)}
    torch.save({"model": state}, tmp_path / "ALBEF.pth")
    run = TrainingRun(tiny(model=cross, losses=losses, checkpoint=str(tmp_path / "ALBEF.pth")))
    assert torch.equal(run.task.network.itm.classifier.weight, state["itm_head.weight"])
    assert run.ancestry[0]["checkpoint"].endswith("ALBEF.pth")
