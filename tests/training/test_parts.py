"""Frozen parts, factors and layer decay, against runs that do without and optimizers made by hand."""

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from mamo.benchmark.products import Products
from mamo.config.schema import RunConfig
from mamo.models.layers import split_around
from mamo.tasks.registry import build_task
from mamo.trainer import TrainingRun, train
from mamo.training import optim
from mamo.training.optim import make_optimizer
from mamo.training.parts import freeze_parts, learning_rate_scales, stay_in_eval
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of
from tests.training.test_resume import ends_of, interrupted

pytestmark = pytest.mark.usefixtures("no_curves")

DEEP = {"image": {"depth": 3}, "text": {"layers": 2}, "fusion_layers": 2, "dropout": 0.0}
ALBEF: dict[str, Any] = {
    "model": {"fusion_type": "cross"},
    "losses": {
        "weights": {"mim": 0, "mrm_image": 0, "mrm_text": 0},
        "itc_soft_target_alpha": 0.4,
        "mlm_soft_target_alpha": 0.4,
    },
}


def run_of(folder: Path, parts: dict[str, Any], **over: Any) -> TrainingRun:
    model = {**DEEP, **over.pop("model", {})}
    training = {"parts": parts, **over.pop("training", {})}
    return TrainingRun(config_of(output_dir=str(folder / "run"), model=model, training=training, **over))


def backward_of(run: TrainingRun, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of the first step, with a teacher that has left the student where it may."""
    its = run.task.teacher.backbone
    torch.manual_seed(5)
    for name, part in (("image", its.image_encoder), ("text", its.text_encoder), ("fusion", its.fusion)):
        for parameter in part.parameters():
            noise = 0.05 * torch.randn_like(parameter)
            parameter.add_(noise if name in MOVED else 0.0)
    run.task.network.train()
    _, values = run.dry_run_loop("fp32", folder).backward(run.example_batch(8), 0)
    gradients = {n: p.grad for n, p in run.task.network.named_parameters() if p.grad is not None}
    return values, gradients


MOVED: set[str] = set()


@pytest.mark.parametrize(
    ("parts", "over", "is_frozen"),
    [
        ({"image": "all"}, {}, lambda n: ".image_encoder." in n),
        ({"image": "all", "text": "all"}, {**ALBEF, "training": {"micro_batch_size": 4}}, lambda n: "_encoder." in n),
        ({"text": "all"}, {"masking": {"mode": "joint"}}, lambda n: ".text_encoder." in n),
        ({"fusion": "all"}, {}, lambda n: ".fusion." in n),
        ({"heads": "all"}, {}, lambda n: "_encoder." not in n and ".fusion." not in n),
        (
            {"image": 2, "text": 1},
            {},
            lambda n: (
                "image_encoder" in n and ".blocks.2." not in n and ".vit.norm." not in n
            ) or ("text_encoder" in n and ".layer.1." not in n),
        ),
    ],
)  # fmt: skip
def test_the_rest_gets_the_gradients_of_a_run_that_does_not_freeze(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, Any],
    over: dict[str, Any],
    is_frozen: Callable[[str], bool],
) -> None:
    """Bug: freezing cuts a path to a part that trains, freezes another part or one layer too many, or hands the loss
    the encodings of masked for those of clean captions, or of another micro-batch."""
    whole = [name for name, value in parts.items() if value == "all"]
    monkeypatch.setattr(f"{__name__}.MOVED", {"image", "text", "fusion"} - {*whole})
    values, gradients = backward_of(run_of(tmp_path / "plain", {}, **copy.deepcopy(over)), tmp_path)
    settings = {name: {"freeze": value} for name, value in parts.items()}
    found, others = backward_of(run_of(tmp_path / "frozen", settings, **copy.deepcopy(over)), tmp_path)
    assert others.keys() == {name for name in gradients if not is_frozen(name)}
    assert any(map(is_frozen, gradients))
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, msg=name)
    for name, gradient in others.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_frozen_part_rests_in_all_it_has(tmp_path: Path) -> None:
    """Bug: a frozen part is in the optimizer, moves by decay, drops out, or its teacher's copy is another one."""
    run = run_of(tmp_path, {"image": {"freeze": "all"}, "fusion": {"freeze": "all"}}, model={"dropout": 0.5})
    network, teacher = run.task.network, run.task.teacher.backbone
    parts = {name: getattr(network.backbone, name) for name in ("image_encoder", "fusion")}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    network.train()
    loop = run.dry_run_loop("fp32", tmp_path)
    for step in range(2):
        loop.step(run.example_batch(8), step)
    moved = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    for name, part in parts.items():
        assert not any(module.training for module in part.modules())
        assert not {id(p) for p in part.parameters()} & moved
        assert not [p for p in part.parameters() if p in run.optimizer.state]
        for other in (part, getattr(teacher, name)):
            for key, value in other.state_dict().items():
                assert torch.equal(value, before[name][key]), f"{name}.{key}"
    assert network.backbone.text_encoder.bert.training
    assert moved == {id(p) for p in network.parameters() if p.requires_grad}


def test_running_statistics_rest() -> None:
    """Bug: a batch norm in a frozen part follows the data, in the student or in a copy of it."""
    network = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), nn.BatchNorm1d(3))
    stay_in_eval(network[0])
    for one in (network, copy.deepcopy(network)):
        one.eval().train()(5 + torch.randn(8, 3))
        assert torch.equal(one[0][0].running_mean, torch.zeros(3))
        assert not torch.equal(one[1].running_mean, torch.zeros(3))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_encoder_costs_one_forward_pass(tmp_path: Path, freeze: bool) -> None:
    """Bug: a frozen image encoder has a backward pass, or teacher and student both encode; counted by products."""
    run = run_of(tmp_path, {"image": {"freeze": "all"}} if freeze else {}, **ALBEF)
    encoder, batch = run.task.network.backbone.image_encoder, run.example_batch(8)
    run.task.network.train()
    step = Products(lambda: run.dry_run_loop("fp32", tmp_path).backward(batch, 0), run.device).operations
    other = run_of(tmp_path / "other", {}, **ALBEF)
    whole = Products(lambda: other.dry_run_loop("fp32", tmp_path).backward(batch, 0), run.device).operations
    trained = other.task.network.backbone.image_encoder
    student = Products(lambda: trained(batch.image).sum().backward(), run.device).operations
    width, tokens = encoder.width, 5
    key_values = 2 * 2 * 8 * tokens * 2 * width * width  # the gradient of the encoded image, by each of two layers
    projection = 2 * 8 * width * 16  # and by ITC's projection
    assert whole - step == (student + key_values + projection if freeze else 0)


def test_a_resume_does_not_thaw(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[[Callable[[], None]], str]
) -> None:
    """Bug: a resumed run trains what was frozen, or does not find the optimizer's state again."""
    training = {
        "total_steps": 6,
        "checkpoint_every_steps": 3,
        "parts": {"image": {"freeze": "all"}, "text": {"freeze": 1}},
    }
    whole = tiny(training=training, output_dir=str(tmp_path / "whole"))
    train(whole, is_resume=False)
    config = tiny(training=training)
    interrupted(config, 5)
    thawed = tiny(training={**training, "parts": {}})
    message = fails(lambda: train(thawed, is_resume=True))
    assert "training.parts.image.freeze: all in the run, none now" in message
    train(config, is_resume=True)
    assert ends_of(tmp_path / "run", 6) == ends_of(tmp_path / "whole", 6)


# ---- learning rates of parts and layers -----------------------------------------------------------------------------

RATES = {
    "image": {"learning_rate_factor": 0.5, "layer_decay": 0.8},
    "text": {"layer_decay": 0.5},
    "heads": {"learning_rate_factor": 3.0},
}


def expected_scale(name: str) -> float:
    """`RATES` spelled out for three blocks and two layers of BERT."""
    if ".image_encoder." in name:
        block = next((k for k in range(3) if f".blocks.{k}." in name), None)
        level = 3 if ".vit.norm." in name else 0 if block is None else block + 1
        return 0.5 * 0.8 ** (3 - level)
    if ".text_encoder." in name:
        return 0.5 ** (0 if ".layer.1." in name else 1 if ".layer.0." in name else 2)
    return 1.0 if ".fusion." in name else 3.0


def test_factors_and_decay_equal_adamw_by_hand(tmp_path: Path) -> None:
    """Bug: a layer's rate is off by a level, the factor also scales the decay twice, or ten steps drift."""
    run = run_of(tmp_path, RATES)
    network = run.task.network.double()
    config = run.config.training.model_copy(update={"weight_decay": 0.3, "learning_rate": 1e-2})
    optimizer = make_optimizer(network, config, learning_rate_scales(run.task, config.parts))
    mine = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(value) for name, value in mine.items()} for _ in "ab")
    torch.manual_seed(0)
    for step in range(1, 11):
        rate = optim.learning_rate_at(config, step)
        optim.set_learning_rate(optimizer, rate)
        for name, parameter in network.named_parameters():
            if name in mine:
                gradient = parameter.grad = torch.randn_like(parameter)
                own = rate * expected_scale(name)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                mine[name] = mine[name] * (1 - own * (0.3 if parameter.ndim >= 2 else 0.0)) - own * update
        optimizer.step()
    for name, parameter in network.named_parameters():
        if name in mine:
            torch.testing.assert_close(parameter.detach(), mine[name], rtol=1e-10, atol=1e-12, msg=name)


def test_levels_of_a_vit_are_timms() -> None:
    """Bug: the order of registration is not that of the layers, or the final norm is a level of its own."""
    config = config_of(model=DEEP, training={"parts": {"image": {"layer_decay": 0.7}}})
    task = build_task(config, scenes_tokenizer())
    scales = learning_rate_scales(task, config.training.parts)
    vit = task.network.backbone.image_encoder.vit
    theirs = {p: group["lr_scale"] for group in param_groups_layer_decay(vit, layer_decay=0.7) for p in group["params"]}
    assert len(theirs) > 30
    assert {id(p): scale for p, scale in scales.items()} == {id(p): scale for p, scale in theirs.items()}


def test_muon_with_factors_equals_an_optimizer_a_factor(tmp_path: Path) -> None:
    """Bug: Muon's groups share one rate, or a factor reaches its step but not its decay."""
    run = run_of(tmp_path, RATES, training={"optimizer": "muon", "weight_decay": 0.3, "learning_rate": 0.05})
    network = run.task.network
    other = copy.deepcopy(network)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    matrices = {id(p) for p in optim.layer_matrices(other)}
    own: list[torch.optim.Optimizer] = []
    for name, parameter in other.named_parameters():
        if name in names:
            rate = 0.05 * expected_scale(name)
            if id(parameter) in matrices:
                own.append(torch.optim.Muon([parameter], lr=rate, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"))
            else:
                decay = 0.3 if parameter.ndim >= 2 else 0.0
                own.append(torch.optim.AdamW([parameter], rate, (0.9, 0.999), weight_decay=decay, fused=True))
    assert len({expected_scale(n) for n, p in other.named_parameters() if id(p) in matrices}) == 4
    optimizer = run.optimizer
    optim.set_learning_rate(optimizer, 0.05)
    for step in range(3):
        torch.manual_seed(step)
        for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
            if mine.requires_grad:
                mine.grad = torch.randn_like(mine)
                theirs.grad = mine.grad.clone()
        optimizer.step()
        with contextlib.nullcontext() if optim.has_bf16_products() else optim.RoundedProducts():
            for one in own:
                one.step()
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_a_factor_scales_the_logged_rate_of_no_other_part(tmp_path: Path, layer_decay: float) -> None:
    """Bug: the loop sets one rate for all groups, so that factors hold for the first step only."""
    run = run_of(tmp_path, {"fusion": {"learning_rate_factor": 10.0, "layer_decay": layer_decay}})
    loop = run.dry_run_loop("fp32", tmp_path)
    values = loop.read(loop.step(run.example_batch(8), 1))
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    network = run.task.network
    assert rates[id(network.backbone.image_encoder.vit.norm.weight)] == values["learning_rate"] == 1e-4
    top, below = (layer.fc1.weight for layer in reversed(network.backbone.fusion.layers))
    assert rates[id(top)] == pytest.approx(1e-3)
    assert rates[id(below)] == pytest.approx(1e-3 * layer_decay)


# ---- refusals -------------------------------------------------------------------------------------------------------

ALL = {"freeze": "all"}


@pytest.mark.parametrize(
    ("task", "parts", "over", "message"),
    [
        ("pretrain", dict.fromkeys(("image", "text", "fusion", "heads"), ALL), {}, "nothing would be trained"),
        ("pretrain", {"heads": {"layer_decay": 0.9}}, {}, "training.parts.heads.layer_decay: the heads have no layers"),
        ("pretrain", {"heads": {"freeze": 1}}, {}, "training.parts.heads.freeze: the heads have no layers"),
        ("pretrain", {"image": {"freeze": "all", "layer_decay": 0.9}}, {}, "layer_decay: contradicts freeze: all"),
        ("pretrain", {"image": {"freeze": 2}}, {}, "training.parts.image.freeze: 2 layers, ImageEncoder has 1"),
        (
            "pretrain",
            {"image": {"freeze": 0}},
            {},
            "training.parts.image.freeze: Input should be greater than or equal",
        ),
        ("mlim", {"image": {"layer_decay": 0.9}}, {}, "training.parts.image.layer_decay: PixelEmbedder has no layers"),
        ("mlim", {"fusion": ALL}, {}, "training.parts.fusion: the network of task mlim has no such part; remove it"),
        (
            "pretrain",
            {"image": ALL, "text": ALL, "heads": ALL},
            {"losses": {"weights": {"itm": 0, "mlm": 0, "mim": 0, "mrm_image": 0, "mrm_text": 0}}},
            "training.parts: every parameter that a loss reaches is frozen",
        ),
    ],
)
def test_what_cannot_train_so_is_refused(
    tmp_path: Path, task: str, parts: dict[str, Any], over: dict[str, Any], message: str
) -> None:
    """Bug: a traceback, or a run that trains nothing or other layers than asked for."""
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingRun(config_of(task, output_dir=str(tmp_path / "run"), training={"parts": parts}, **over))


def test_mlims_parts_freeze(tmp_path: Path) -> None:
    """Bug: a task without a fusion or teacher has no parts."""
    config = config_of(
        "mlim", output_dir=str(tmp_path / "run"), training={"parts": {"image": ALL, "text": {"freeze": 1}}}
    )
    run = TrainingRun(config)
    trained = {name for name, p in run.task.network.named_parameters() if p.requires_grad}
    assert not [name for name in trained if ".embedder." in name or ".text_encoder." in name]
    assert "backbone.image_position" in trained


def test_a_shared_weight_belongs_to_its_part() -> None:
    """Bug: frozen heads freeze the word embeddings that the masked-word head shares with the text encoder."""
    config = config_of(training={"parts": {"heads": ALL}})
    task = build_task(config, scenes_tokenizer())
    freeze_parts(task, config.training.parts)
    assert task.network.mlm.decoder.weight.requires_grad
    assert not task.network.mlm.decoder.bias.requires_grad
    assert not task.network.mlm.train().training


def test_what_lies_between_two_layers_goes_with_the_next() -> None:
    """Bug: a downsampling between stages counts as the top of the tower."""
    network = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.BatchNorm1d(1), nn.Linear(2, 2), nn.Linear(3, 3))
    levels = split_around(network, [network[1], network[3]])
    assert [[name for name, _ in items] for items in levels] == [["0"], ["1"], ["2", "3"], ["4"]]
