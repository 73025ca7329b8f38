"""The precision of a run: its choice, and training in fp16 with a dynamic loss scale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamo.config.schema import RunConfig
from mamo.data.collate import Batch
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint, precision, run_dir
from mamo.training.failure import NonFiniteLoss
from mamo.training.guard import PendingStep
from mamo.training.loop import Loop
from mamo.training.precision import LossScale, Precision, choose_precision

pytestmark = pytest.mark.usefixtures("no_curves")


def ready(config: RunConfig, scale: float) -> tuple[TrainingRun, Loop, Batch]:
    """A run in fp16 with this loss scale, its loop and its first batch."""
    run = TrainingRun(config)
    run.task.network.train()
    assert config.training.precision != "auto"
    loop = run.dry_run_loop(config.training.precision, Path(config.output_dir))
    if loop.guard.loss_scale is not None:
        loop.guard.loss_scale = LossScale(scale)
    return run, loop, next(run.batches(0, 0))


def state_of(run: TrainingRun) -> dict[str, Tensor]:
    """Everything that a step moves."""
    tensors = checkpoint.snapshot(run.task.modules(), run.optimizer)
    return {f"{name}/{key}": value for name, values in tensors.items() for key, value in values.items()}


def test_gradients_are_those_of_fp32(tiny: Callable[..., RunConfig]) -> None:
    """Bug: gradients stay multiplied by the scale, or small ones vanish in fp16."""
    found: dict[str, Tensor] = {}
    for name in ("fp32", "fp16"):
        run, loop, batch = ready(tiny(training={"precision": name}), 256.0)
        loop.backward(batch, 0)
        found[name] = torch.cat([p.grad.flatten() for p in run.task.network.parameters() if p.grad is not None])
    assert found["fp16"].dtype == torch.float32
    assert (found["fp16"] - found["fp32"]).norm() < 0.01 * found["fp32"].norm()


def test_an_overflow_moves_nothing(tiny: Callable[..., RunConfig]) -> None:
    """Bug: optimizer, teacher, queue or temperature move by an infinite gradient, or the next step keeps it."""
    run, loop, batch = ready(tiny(training={"precision": "fp16"}), 2.0**40)
    before = state_of(run)
    row = loop.read(loop.step(batch, 0))
    after = state_of(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (row["loss_scale"], row["overflows"]) == (2.0**39, 1)
    assert "gradient_norm" not in row  # JSON has no infinity
    loop.guard.loss_scale = LossScale(256.0)
    assert loop.read(loop.step(batch, 0))["gradient_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in state_of(run).items() if name in before)


def test_the_run_ends_after_some_overflows_in_a_row(tiny: Callable[..., RunConfig]) -> None:
    """Bug: a run that can take no step goes on for ever, or one finite step does not clear the count."""
    scale = LossScale()
    for _ in range(8):
        count(scale, is_finite=False)
        assert scale.can_go_on()
    count(scale, is_finite=True)
    assert scale.numbers() == {"value": 2.0**8, "steps_since": 1, "overflows": 8, "in_a_row": 0}
    _, loop, batch = ready(tiny(training={"precision": "fp16"}), 2.0**60)
    for _ in range(LossScale.MOST_IN_A_ROW):
        loop.step(batch, 0)
    with pytest.raises(NonFiniteLoss, match="not finite at step 1: gradient_norm"):
        loop.step(batch, 0)


def count(scale: LossScale, is_finite: bool) -> None:
    """Record a step."""
    scale.record(torch.tensor(is_finite), counts=torch.tensor(True))


def test_a_loss_that_is_not_finite_ends_the_run(tiny: Callable[..., RunConfig]) -> None:
    """Bug: a NaN of the forward pass is taken for an overflow of the scale."""
    run, loop, batch = ready(tiny(training={"precision": "fp16"}), 256.0)
    with torch.no_grad():
        run.task.network.itm.classifier.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="loss/itm"):
        loop.step(batch, 0)


def test_the_scale_grows_after_many_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the scale grows at every step after the first growth, or never again."""
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 3)
    scale, seen = LossScale(4.0), []
    for is_finite in (True, True, False, True, True, True, True, True, True):
        count(scale, is_finite)
        seen.append(scale.value)
    assert seen == [4, 4, 2, 2, 2, 4, 4, 4, 8]


def test_a_resume_continues_to_the_same_bits(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the scale starts anew at a resume, so that steps are left out a second time."""
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 2)
    rows = {}  # all steps before the checkpoint are left out: the optimizer has no state yet
    for name in ("whole", "broken"):
        training = {"precision": "fp16", "total_steps": 12, "checkpoint_every_steps": 3}
        config = tiny(output_dir=str(tmp_path / name), training=training)
        if name == "broken":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Loop, "step", stopping_at(4))
                with pytest.raises(RuntimeError, match="planted"):
                    train(config, is_resume=False)
        train(config, is_resume=name == "broken")
        rows[name] = run_dir.read_jsonl(tmp_path / name / run_dir.METRICS)
    assert rows["whole"] == rows["broken"]
    assert len(rows["whole"]) == 12
    assert rows["whole"][2]["overflows"] == 3
    assert rows["whole"][-1]["overflows"] < 12
    assert len({row["loss_scale"] for row in rows["whole"]}) > 2


def stopping_at(number: int) -> Any:
    """`Loop.step` that fails at this 0-based step."""
    step = Loop.step

    def fail(loop: Loop, batch: Batch, at: int) -> PendingStep:
        if at == number:
            raise RuntimeError("planted")
        return step(loop, batch, at)

    return fail


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_without_bf16_takes_fp16(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str) -> None:
    """Bug: an older GPU emulates bf16 at a tenth of the speed of fp16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choose_precision(torch.device("cuda"), no_step) == expected


def no_step(_: Precision) -> None:
    """A step that must not be timed."""
    raise AssertionError("a step was timed")


def test_steps_are_timed_only_where_bf16_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run on a CPU that emulates bf16 begins with a minute of emulated steps."""
    monkeypatch.setattr(precision, "product_seconds", lambda: {"fp32": 1.0, "bf16": 1.1})
    assert choose_precision(torch.device("cpu"), no_step) == "fp32"
    monkeypatch.setattr(precision, "product_seconds", lambda: {"fp32": 1.0, "bf16": 0.3})
    timed: list[str] = []
    choose_precision(torch.device("cpu"), timed.append)
    assert timed == ["fp32"] * 4 + ["bf16"] * 4


def test_deterministic_operations_are_used_in_steps_only(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: `training.deterministic` changes nothing, changes the numbers of a CPU, or outlasts the run."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[bool] = []
    step = Loop.step

    def watched(self: Loop, batch: Batch, number: int) -> PendingStep:
        efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
        seen.append(torch.are_deterministic_algorithms_enabled() and not efficient)
        return step(self, batch, number)

    monkeypatch.setattr(Loop, "step", watched)
    curves = []
    for wanted in (False, True):
        training = {"total_steps": 3, "warmup_steps": 0, "deterministic": wanted}
        config = tiny(training=training, output_dir=str(tmp_path / str(wanted)))
        train(config, is_resume=False)
        curves.append((tmp_path / str(wanted) / run_dir.METRICS).read_bytes())
    assert seen == [False] * 3 + [True] * 3
    assert curves[0] == curves[1]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
