"""`--plan`: what a run will cost."""

import itertools
import math
import time
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


@pytest.mark.parametrize("micro", [32, 40, 96])
def test_a_large_micro_batch_is_extrapolated(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """Bug: the estimate of a micro-batch runs that micro-batch, or what it extrapolates is off."""
    losses = {"queue_size": 24, "itm_pool_size": 4}
    run = TrainingRun(tiny(training={**SHORT, "batch_size_global": micro}, losses=losses))
    loop = run.dry_run_loop("fp32", Path("unused"))
    exact = estimate.pass_cost(run, loop, micro)
    seen: list[int] = []
    backward = loop.backward
    monkeypatch.setattr(loop, "backward", lambda batch, step: (seen.append(len(batch)), backward(batch, step))[1])
    lines, needed = estimate.plan(run, loop)
    assert max(seen) == (32 if micro == 32 else 16)
    values = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert float(values["operations a sample"].split()[0]) == pytest.approx(exact.operations / micro / 1e9, abs=0.0006)
    whole = sum(estimate.memory_bytes(run, int(exact.peak_bytes + exact.loaded_bytes)).values())
    assert needed == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"training": {"batch_size_global": 10**10}}, "nothing was measured: the estimated"),
        ({"training": {"batch_size_global": 10**10, "precision": "auto"}}, "nothing was measured: the estimated"),
        ({"training": {"batch_size_global": 10_000_000}}, "lower training.micro_batch_size (now 10,000,000)"),
        ({"model": {"image": {"depth": 100_000}}}, "model.image.depth: 100,000 layers are not planned"),
        ({"model": {"text": {"layers": 100_000}}}, "model.text.layers: 100,000 layers are not planned"),
        ({"model": {"fusion_layers": 10**9}}, "model.fusion_layers: 1,000,000,000 layers are not planned"),
        ({"model": {"text": {"width": 10**9}}}, "model.text: needs at least"),
        ({"model": {"image": {"width": 10**9}}}, "model.image: needs at least"),
        ({"model": {"text": {"mlp_width": 10**12}}}, "model.text: needs at least"),
        ({"data": {"image_size_px": 80_000}}, "data.image_size_px: needs at least"),
        ({"losses": {"queue_size": 10**13}}, "out of memory: lower"),
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_fast(
    tiny: Callable[..., RunConfig], fails: Callable[..., str], override: dict[str, dict[str, object]], expected: str
) -> None:
    """Bug: `--plan` runs the batch that it should forecast, or builds a network of any size, until it is killed."""
    started = time.monotonic()
    sections = {**override, "training": {**SHORT, **override.get("training", {})}}
    config = tiny(**sections)
    message = fails(lambda: estimate.print_estimate(config))
    assert expected in message
    assert time.monotonic() - started < 20


def test_the_estimate_comes_before_what_is_measured(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: nothing is printed while a large batch runs; the machine is out of memory before the estimate is seen."""

    def measure(*_: object) -> list[str]:
        assert "peak memory, estimated" in capsys.readouterr().out
        return ["measured"]

    monkeypatch.setattr(estimate, "measure", measure)
    estimate.print_estimate(tiny(training=SHORT))
    assert capsys.readouterr().out == "measured\n"
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(estimate, "check_sizes", lambda config: None)
    with pytest.raises(ValueError, match=r"nothing was measured: the estimated .* more than half of the 1 MiB"):
        estimate.print_estimate(tiny(training=SHORT))


def test_a_large_batch_is_timed_from_a_small_one(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the seconds of a step are those of the small batch that was timed."""
    losses = {"queue_size": 24, "itm_pool_size": 4}
    config = tiny(training={**SHORT, "batch_size_global": 80_000, "micro_batch_size": 400}, losses=losses)
    run = TrainingRun(config)
    loop = run.dry_run_loop("fp32", Path("unused"))
    timed: list[int] = []

    def times(run: TrainingRun, loop: object, size: int) -> tuple[float, float, float]:
        timed.append(size)
        return 0.01 * size, 0.5, 0.002 * size

    monkeypatch.setattr(estimate, "time_steps", times)
    line, _ = estimate.measure(run, loop)
    assert timed == [8]  # a micro-batch would take 4 s
    assert line == "measured: 800.500 s a step, 160.000 s to load its batch in one process (0 workers), from 8 samples"
    monkeypatch.setattr(estimate, "MEASURED_S", 5.0)
    timed.clear()
    estimate.measure(run, loop)
    assert timed == [8, 400]
