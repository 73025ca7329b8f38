"""`--plan`: what a run will cost."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from mamo import estimate
from mamo.config.schema import RunConfig
from mamo.models.attention import explicit_attention
from mamo.trainer import TrainingRun

SHORT = {"total_steps": 20, "checkpoint_every_steps": 5}


def test_the_table_adds_up(tiny: Callable[..., RunConfig]) -> None:
    """Bug: the weight that the masked-word head shares is counted twice, or a head is left out."""
    run = TrainingRun(tiny(training=SHORT))
    network = run.task.network
    table = estimate.parameter_table(run.task.modules())
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
    assert estimate.count_operations(lambda: layer(x)) == product
    assert estimate.count_operations(lambda: layer(x).sum().backward()) == 2 * product  # the input needs no gradient
    assert estimate.count_operations(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * product

    query = torch.randn(batch, heads, tokens, width // heads, requires_grad=True)
    scores = 2 * batch * heads * tokens * tokens * (width // heads)  # and as many for the weighted sum
    attention = functional.scaled_dot_product_attention
    assert estimate.count_operations(lambda: attention(query, query, query)) == 2 * scores
    assert (
        estimate.count_operations(lambda: explicit_attention(query, query, query, None).sum().backward()) == 6 * scores
    )


def test_peak_counts_each_storage_while_it_lives() -> None:
    """Bug: a view, a change in place or what was there before counts, or what is gone still does."""
    before = torch.zeros(500)

    def work() -> None:
        first = torch.zeros(1000)
        second = first + 1
        first.view(10, 100).add_(before[:100])
        del first
        third = second + 1
        del second
        third[:10].clone()

    assert estimate.peak_bytes(work) == 4 * 2000
    assert estimate.peak_bytes(lambda: before.view(5, 100).add_(1)) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_peak_of_a_pass_equals_what_the_allocator_saw(
    tiny: Callable[..., RunConfig], precision: str, is_checkpointed: bool
) -> None:
    """Bug: the backward pass, its gradients, the rounded weights or the inputs kept by checkpointing are left out."""
    config = tiny(training={**SHORT, "precision": precision, "activation_checkpointing": is_checkpointed})
    run = TrainingRun(config)
    loop = run.dry_run_loop(precision, Path("unused"))  # type: ignore[arg-type]
    batch = run.example_batch(8)
    loop.backward(batch, 0)  # what is made once
    run.task.network.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = loop.backward(batch, 0)
    run.task.network.zero_grad(set_to_none=True)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    seen = max(itertools.accumulate(event.nbytes() for event in changes))
    told = estimate.peak_bytes(lambda: loop.backward(batch, 0))
    assert told == pytest.approx(seen, rel=0.1)  # operations use some memory inside
    del kept


def test_the_memory_estimate_bounds_what_a_step_holds(tiny: Callable[..., RunConfig]) -> None:
    """Bug: Adam's moments or the teacher are forgotten."""
    run = TrainingRun(tiny(training=SHORT))
    memory = estimate.memory_bytes(run, 1000)
    assert memory["micro-batch and gradients"] == 1000
    loop = run.dry_run_loop("fp32", Path("unused"))
    loop.step(run.example_batch(8), 0)
    state = [v for s in run.optimizer.state.values() for v in s.values() if v.ndim]
    held = sum(
        t.numel() * t.element_size() for t in [*run.task.network.parameters(), *run.task.teacher.parameters(), *state]
    )
    told = memory["weights"] + memory["teacher"] + memory["Adam"]
    assert told == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plan_prints_everything_and_writes_nothing(
    tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """Bug: planning claims the folder of the run, so that the run itself is then refused; a number is missing."""
    config = tiny(training={**SHORT, "precision": precision, "micro_batch_size": 4})
    estimate.print_estimate(config)
    assert not (tmp_path / "run").exists()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert lines["steps"] == "20"
    assert lines["samples"] == "160 (3.20 epochs of 50)"
    assert lines["image tokens"] == "800 (5 a sample)"  # four patches and the class token
    assert lines["a step"] == "8 samples in micro-batches of 4"
    gflop = float(lines["operations a sample"].split()[0])
    assert gflop > 0
    assert float(lines["bytes a sample as loaded"].replace(",", "")) > 3 * 16 * 16
    assert "gradients" in lines["peak memory, estimated"]
    seconds = float(lines["measured"].split()[0])
    assert math.isfinite(seconds)
    assert "hours" in next(value for key, value in lines.items() if key.startswith("so "))
