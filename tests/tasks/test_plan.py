"""`--plan`: what a run will cost."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from mamo.config import Config
from mamo.models.attention import explicit_attention
from mamo.tasks import plan
from mamo.tasks.launch import Run

SHORT = {"total_steps": 20, "checkpoint_every_steps": 5}


def test_the_table_adds_up(tiny: Callable[..., Config]) -> None:
    """Bug: the weight that the masked-word head shares is counted twice, or a head is left out."""
    run = Run(tiny(training=SHORT))
    network = run.task.network
    table = plan.parameter_table(run.task.modules())
    assert table["total"] == sum(p.numel() for p in network.parameters())
    assert table["teacher (a copy)"] == sum(p.numel() for p in network.backbone.parameters())
    assert table["of these trainable"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert table["image_encoder"] == sum(p.numel() for p in network.backbone.image_encoder.parameters())
    assert table["head itm"] == 2 * 32 + 2
    assert table["projections"] == 2 * (32 * 16 + 16)
    assert table["head mlm"] == (32 * 32 + 32) + 2 * 32 + len(run.tokenizer)  # dense, norm, bias; not the shared matrix
    parts = [name for name in table if name.startswith("head ")]
    assert parts == [f"head {name}" for name in ("itm", "mlm", "mim", "mrm_image", "mrm_text")]


def test_operations_equal_the_closed_form() -> None:
    """Bug: the backward pass, or attention in the library's fused form, is not counted."""
    tokens, width, batch, heads = 10, 16, 3, 2
    layer = nn.Linear(width, 3 * width)
    x = torch.randn(batch, tokens, width)
    product = 2 * batch * tokens * width * 3 * width
    assert plan.count_operations(lambda: layer(x)) == product
    assert plan.count_operations(lambda: layer(x).sum().backward()) == 2 * product  # the input needs no gradient
    assert plan.count_operations(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * product

    query = torch.randn(batch, heads, tokens, width // heads, requires_grad=True)
    scores = 2 * batch * heads * tokens * tokens * (width // heads)  # and as many for the weighted sum
    attention = functional.scaled_dot_product_attention
    assert plan.count_operations(lambda: attention(query, query, query)) == 2 * scores
    assert plan.count_operations(lambda: explicit_attention(query, query, query, None).sum().backward()) == 6 * scores


def test_kept_activations_of_a_small_network() -> None:
    """Bug: weights are counted as activations, or a tensor that two operations keep is counted twice."""
    network = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Sigmoid(), nn.Linear(16, 8, bias=False))
    x = torch.randn(5, 8)
    kept = plan.count_activation_bytes(lambda: network(x).sum().backward(), network)
    assert kept == 4 * (5 * 8 + 5 * 16)  # the input and the sigmoid, which both its neighbours keep


def test_the_memory_estimate_bounds_what_a_step_holds(tiny: Callable[..., Config]) -> None:
    """Bug: Adam's moments, the teacher or the gradients are forgotten."""
    run = Run(tiny(training=SHORT))
    memory = plan.memory_bytes(run, 1000)
    n = sum(p.numel() for p in run.task.network.parameters())
    assert memory["micro-batch"] == 1000
    loop = run.trial_loop("fp32", Path("unused"))
    loop.step(run.example_batch(8), 0)
    state = [v for s in run.optimizer.state.values() for v in s.values() if v.ndim]
    held = sum(
        t.numel() * t.element_size() for t in [*run.task.network.parameters(), *run.task.teacher.parameters(), *state]
    )
    told = memory["weights"] + memory["teacher"] + memory["Adam"]
    assert told == pytest.approx(held, rel=0.01)
    assert 0 < memory["gradients"] <= 4 * n


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plan_prints_everything_and_writes_nothing(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """Bug: planning claims the folder of the run, so that the run itself is then refused; a number is missing."""
    config = tiny(training={**SHORT, "precision": precision, "micro_batch_size": 4})
    plan.print_plan(config)
    assert not (tmp_path / "run").exists()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert lines["steps"] == "20"
    assert lines["samples"] == "160 (3.20 epochs of 50)"
    assert lines["image tokens"] == "800 (5 a sample)"  # four patches and the class token
    assert lines["a step"] == "8 samples in micro-batches of 4"
    gflop = float(lines["operations a sample"].split()[0])
    assert gflop > 0
    assert float(lines["bytes a sample as loaded"].replace(",", "")) > 3 * 16 * 16
    assert float(lines["activation bytes a sample, kept for the backward pass"].replace(",", "")) > 0
    assert "gradients" in lines["peak memory, estimated"]
    seconds = float(lines["measured"].split()[0])
    assert math.isfinite(seconds)
    assert "hours" in next(value for key, value in lines.items() if key.startswith("so "))
