"""Optimizer groups and the learning-rate schedule against PyTorch's own schedulers."""

from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_wsd_schedule

from mamo.config.schema import TrainingConfig
from mamo.models.layers import LayeredModule
from mamo.training import checkpoint
from mamo.training.optim import RoundedProducts, layer_matrices, learning_rate_at, make_optimizer, parameter_groups


def test_schedule_equals_pytorchs_schedulers() -> None:
    """Bug: warm-up off by one or from the wrong start, or a cosine over the wrong span."""
    config = TrainingConfig(total_steps=30, warmup_steps=10, learning_rate=3e-3, learning_rate_min=2e-4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    warmup = LinearLR(optimizer, start_factor=1 / 10, total_iters=9)
    for step in range(10):
        assert learning_rate_at(config, step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        warmup.step()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    cosine = CosineAnnealingLR(optimizer, T_max=20, eta_min=2e-4)
    for step in range(10, 30):
        assert learning_rate_at(config, step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        cosine.step()


def test_albefs_schedule_equals_timms_driven_as_its_code_does() -> None:
    """Bug: a smooth warm-up, one from 0, or a cosine that begins after it or falls at every step."""
    epoch_steps, stair, n_epochs = 100, 3, 4
    config = TrainingConfig(
        total_steps=n_epochs * epoch_steps,
        warmup_steps=20 * stair,
        learning_rate=1e-4,
        schedule="albef",
        epoch_steps=epoch_steps,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=n_epochs, lr_min=1e-5, warmup_t=20, warmup_lr_init=1e-5, warmup_prefix=True
    )
    for epoch in range(n_epochs):
        if epoch > 0:
            scheduler.step(epoch + 20)
        for i in range(epoch_steps):
            found = learning_rate_at(config, epoch * epoch_steps + i)
            assert found == pytest.approx(optimizer.param_groups[0]["lr"]), (epoch, i)
            if epoch == 0 and i % stair == 0 and i <= 20 * stair:
                scheduler.step(i // stair)


@pytest.mark.parametrize(("total_steps", "decay_steps"), [(30, 8), (30, 0), (30, 20), (11, 1)])
def test_warmup_stable_decay_equals_transformers(total_steps: int, decay_steps: int) -> None:
    """Bug: the decay begins a step early, ends above the smallest rate's line, or without decay steps falls at all."""
    config = TrainingConfig(
        total_steps=total_steps,
        warmup_steps=10,
        learning_rate=3e-3,
        learning_rate_min=6e-4,
        schedule="warmup-stable-decay",
        decay_steps=decay_steps,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    theirs = get_wsd_schedule(
        optimizer,
        num_warmup_steps=10,
        num_decay_steps=decay_steps,
        num_training_steps=total_steps,
        decay_type="linear",
        min_lr_ratio=0.2,
    )
    for step in range(total_steps):
        if step < 9:  # theirs begins at 0, and a decay of no steps is after the end
            assert learning_rate_at(config, step) == pytest.approx(3e-3 * (step + 1) / 10)
        elif step >= 10:
            assert learning_rate_at(config, step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 7), (7, 7), (1, 7)])
def test_schedule_at_its_edges(warmup_steps: int, total_steps: int) -> None:
    """Bug: a division by zero without warm-up or without anything after it; a rate of 0 or above the peak."""
    config = TrainingConfig(total_steps=total_steps, warmup_steps=warmup_steps)
    rates = [learning_rate_at(config, step) for step in range(total_steps)]
    assert all(0 < rate <= config.learning_rate for rate in rates)
    assert max(rates) == pytest.approx(config.learning_rate)


def test_each_trainable_parameter_is_in_one_group() -> None:
    """Bug: a parameter left out or stepped twice, a frozen one decayed, or decay on biases and norms."""
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4), nn.Linear(4, 2))
    network[3].weight.requires_grad_(False)
    network.temperature = nn.Parameter(torch.tensor(0.07))
    decayed, plain = parameter_groups(network, 0.3)
    assert [id(p) for p in decayed["params"]] == [id(network[0].weight), id(network[2].weight)]
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (network[0].bias, network[1].weight, network[1].bias, network[3].bias, network.temperature)
    }
    assert len(plain["params"]) == 5
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    with_scalars, rest = parameter_groups(network, 0.3, decays_scalars=True)
    assert network.temperature in with_scalars["params"]
    assert all(p.ndim == 1 for p in rest["params"])


def test_first_step_equals_adamw_by_hand() -> None:
    """Bug: a beta, the rate or the decay of the config does not reach the optimizer."""
    layer = nn.Linear(3, 2)
    config = TrainingConfig(learning_rate=0.1, learning_rate_min=0.0, weight_decay=0.5, adam_beta2=0.9)
    optimizer = make_optimizer(layer, config)
    old = {name: p.detach().clone() for name, p in layer.named_parameters()}
    expected = {}
    first, second = dict.fromkeys(old, 0.0), dict.fromkeys(old, 0.0)
    for step in (1, 2):
        for name, parameter in layer.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-8)
            decay = 0.5 if name == "weight" else 0.0
            expected[name] = old[name] * (1 - 0.1 * decay) - 0.1 * update
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-5, rtol=1e-4)
        old = {name: p.detach().clone() for name, p in layer.named_parameters()}


class Layered(LayeredModule):
    """An embedding, two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6)) for _ in "ab")
        self.head = nn.Linear(6, 3)


MUON = TrainingConfig(optimizer="muon", learning_rate=0.1, learning_rate_min=0.0, weight_decay=0.5, adam_beta2=0.9)


def stepped(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_muon_moves_the_matrices_of_layers_by_the_polar_factor_of_their_gradient() -> None:
    """Bug: Muon moves an embedding or a head, its step has another direction, size or decay, or Adam steps twice."""
    torch.manual_seed(0)
    network, plain = Layered(), Layered()
    plain.load_state_dict(network.state_dict())
    matrices = [name for name, p in network.named_parameters() if any(p is m for m in layer_matrices(network))]
    assert matrices == [f"layers.{k}.{part}.weight" for k in (0, 1) for part in (0, 2)]
    stepped(network, make_optimizer(network, MUON), seed=1)
    stepped(plain, make_optimizer(plain, MUON.model_copy(update={"optimizer": "adamw"})), seed=1)
    torch.manual_seed(0)
    old = dict(Layered().named_parameters())
    for (name, parameter), adams in zip(network.named_parameters(), plain.parameters(), strict=True):
        if name not in matrices:
            assert torch.equal(parameter, adams), name
            continue
        assert parameter.grad is not None
        step = (old[name] * (1 - 0.1 * 0.5) - parameter).detach() / (0.1 * 0.2 * max(parameter.shape) ** 0.5)
        left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
        along = left.T @ step @ right.T  # of the polar factor itself the identity; Newton-Schulz gives 0.5 to 1.5
        assert torch.diag(along).min() > 0.4, name
        assert torch.diag(along).max() < 1.6, name
        assert (along - torch.diag(torch.diag(along))).abs().max() < 0.1, name


def test_muons_state_is_saved_and_loaded() -> None:
    """Bug: a resumed run begins with no momentum, or the rate of a step reaches one of the two optimizers alone."""
    torch.manual_seed(0)
    network = Layered()
    optimizer = make_optimizer(network, MUON)
    stepped(network, optimizer, seed=1)
    other = Layered()
    other.load_state_dict(network.state_dict())
    loaded = make_optimizer(other, MUON)
    tensors = {k: v.clone() for k, v in checkpoint.optimizer_tensors(optimizer, network).items()}
    checkpoint.load_optimizer_tensors(loaded, other, tensors)
    for mine, theirs in ((network, optimizer), (other, loaded)):
        for group in theirs.param_groups:
            group["lr"] = 0.01
        stepped(mine, theirs, seed=2)
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    stepped(network, optimizer, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_rounded_products_are_bf16s() -> None:
    """Bug: inputs are rounded twice, sums are kept in bf16, or products of another type are changed."""
    torch.manual_seed(0)
    left, right, added = (torch.randn(24, 24).bfloat16() for _ in range(3))
    seen = ProductTypes()
    with seen, RoundedProducts():
        product, sum_of = left @ right, torch.addmm(added, left, right, beta=0.5, alpha=2.0)
        plain = left.float() @ right.float()
    exact = left.double() @ right.double()
    one_place = {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(product.double(), exact, **one_place)
    torch.testing.assert_close(sum_of.double(), 0.5 * added.double() + 2 * exact, **one_place)
    assert product.dtype == sum_of.dtype == torch.bfloat16
    assert seen.types == [torch.float32] * 3  # bf16's own product is the slow one
    assert torch.equal(plain, left.float() @ right.float())


def test_muon_takes_the_same_step_on_a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the products that replace slow ones lead elsewhere, or are not taken."""
    found = {}
    for is_fast in (True, False):
        torch.manual_seed(0)
        network = TwoLayers()
        calls: list[bool] = []
        monkeypatch.setattr("mamo.training.optim.has_bf16_products", lambda: calls.append(True) or is_fast)  # noqa: B023
        optimizer = make_optimizer(network, TrainingConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.0))
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        network(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        assert calls
        found[is_fast] = {name: value.detach() - before[name] for name, value in network.named_parameters()}
    for name, moved in found[True].items():
        assert (found[False][name] - moved).norm() < 0.02 * moved.norm(), name


class ProductTypes(TorchDispatchMode):
    """Records the type of each matrix product that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record and run."""
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.types.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


class TwoLayers(LayeredModule):
    """Two linear layers, which Muon moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 32)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply both."""
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens
