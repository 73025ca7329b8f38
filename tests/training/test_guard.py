"""A step that is not finite moves nothing, whether the host reads its numbers before the optimizer or a step late."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamo.config.values import merge
from mamo.distributed import is_sharded, process_group, rank
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import load_config
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint, run_dir
from mamo.training.failure import NonFiniteLoss
from mamo.training.guard import HostCopy, held
from mamo.training.loop import Loop
from mamo.training.precision import LossScale
from mamo.training.preemption import Preempted
from tests.tiny import config_of, write_config
from tests.training.test_interruptions import at_step
from tests.training.test_layouts import SMALL, finish, launch

pytestmark = pytest.mark.usefixtures("no_curves")

SHORT = {"total_steps": 6, "checkpoint_every_steps": 2, "warmup_steps": 1}
backward = Loop.backward


def planted(at: int, kind: str) -> Callable[..., Any]:
    """`Loop.backward` that spoils a 0-based step: its `loss` and gradients, or from it on all `gradients` only."""

    def spoil(self: Loop, batch: Any, step: int) -> Any:
        targets, values = backward(self, batch, step)
        if step == at or (kind == "gradients" and step > at):
            for parameter in self.task.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan if kind == "loss" else torch.inf)
            if kind == "loss":
                values["loss/mlm"] = values["loss/mlm"] * torch.nan
        return targets, values

    return spoil


class Outcome:
    """What a run left: each file of its last checkpoint and of the failure's folder, its metrics and its message."""

    def __init__(self, folder: Path, message: str) -> None:
        self.rows = (folder / run_dir.METRICS).read_text()
        self.message = message.replace(str(folder), "RUN")
        self.state: dict[str, Tensor] = {}
        for found in (*checkpoint.step_folders(folder), *(folder / "non-finite").glob("step-*")):
            for file in sorted(found.glob("*.safetensors")):
                tensors = checkpoint.read_tensors(found, file.stem)
                self.state |= {f"{found.name}/{file.stem}/{key}": value for key, value in tensors.items()}
            self.state[f"{found.name}/scale"] = torch.tensor(
                list((json.loads((found / "state.json").read_text()).get("loss_scale") or {}).values())
            )

    def assert_equals(self, other: "Outcome") -> None:
        """Compare to the bit; where no step was taken yet, an optimizer state of zeros is that of none."""
        assert self.rows == other.rows
        assert self.message == other.message
        for key in self.state.keys() | other.state.keys():
            mine, its = self.state.get(key), other.state.get(key)
            if mine is None or its is None:
                assert "/optimizer/" in key
                assert not (its if mine is None else mine).any()
            else:
                assert torch.equal(mine.nan_to_num(7.5), its.nan_to_num(7.5)), key


def outcome(folder: Path, is_late: bool, training: dict[str, Any], step: Any = backward) -> Outcome:
    """Train, with `Loop.backward` replaced by `step`."""
    training = {**SHORT, **training}
    config = config_of(training=training, evaluation={"enabled": True, "every_steps": 3}, output_dir=str(folder))
    message = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamo.training.guard.reads_late", lambda device: is_late)
        patch.setattr(Loop, "backward", step)
        patch.setattr("mamo.trainer.make_evaluator", lambda run, loop: lambda step: seen(run, folder, step))
        patch.setattr("mamo.trainer.write_run_report", lambda run, loop: None)
        try:
            train(config, is_resume=False)
        except NonFiniteLoss as error:
            message = str(error)
    return Outcome(folder, message)


def seen(run: TrainingRun, folder: Path, step: int) -> None:
    """An evaluation: every step before it is finite and logged."""
    assert all(parameter.isfinite().all() for parameter in run.task.network.parameters())
    assert [row["step"] for row in run_dir.read_jsonl(folder / run_dir.METRICS)] == list(range(1, step + 1))


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "bf16"), ("muon", "fp16")])
def test_a_late_read_changes_no_bit(optimizer: str, precision: str, tmp_path: Path) -> None:
    """Bug: the guarded optimizer, teacher or queue moves otherwise than the plain one, or a line of metrics is lost."""
    training = {"optimizer": optimizer, "precision": precision}
    early, late = (outcome(tmp_path / str(is_late), is_late, training) for is_late in (False, True))
    late.assert_equals(early)
    assert [json.loads(row)["step"] for row in late.rows.splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("optimizer", "precision", "at"),
    [
        pytest.param("muon", "fp32", 0, id="first"),
        pytest.param("adamw", "bf16", 1, id="before a checkpoint"),
        pytest.param("adamw", "fp32", 2, id="before an evaluation"),
        pytest.param("adamw", "fp16", 4, id="middle"),
        pytest.param("muon", "bf16", 5, id="last"),
    ],
)
def test_a_loss_that_is_not_finite_moves_nothing(optimizer: str, precision: str, at: int, tmp_path: Path) -> None:
    """Bug: a late read saves or evaluates what a NaN has reached, lets the next step move, or names the next step."""
    training = {"optimizer": optimizer, "precision": precision}
    early, late = (
        outcome(tmp_path / str(is_late), is_late, training, planted(at, "loss")) for is_late in (False, True)
    )
    assert f"not finite at step {at + 1}: loss/mlm, gradient_norm. The optimizer step was not taken" in late.message
    late.assert_equals(early)
    assert len(late.rows.splitlines()) == at
    assert any(key.startswith(f"step-{at + 1:07d}/batch/") for key in late.state)


@pytest.mark.parametrize(("optimizer", "at", "total"), [("muon", 0, 6), ("adamw", 2, 16)], ids=["one", "too many"])
def test_overflows_move_only_the_scale(optimizer: str, at: int, total: int, tmp_path: Path) -> None:
    """Bug: the scale is halved a step late, so that one overflow costs two steps, or the run never ends."""

    def once(self: Loop, batch: Any, step: int) -> Any:
        return planted(at, "gradients")(self, batch, step) if step == at else backward(self, batch, step)

    training = {"optimizer": optimizer, "precision": "fp16", "total_steps": total}
    spoiled = planted(at, "gradients") if total == 16 else once
    early, late = (outcome(tmp_path / str(is_late), is_late, training, spoiled) for is_late in (False, True))
    late.assert_equals(early)
    rows = [json.loads(row) for row in late.rows.splitlines()]
    assert rows[at]["overflows"] == 1 + (rows[at - 1]["overflows"] if at else 0)
    assert "gradient_norm" not in rows[at]
    if total == 16:
        assert f"not finite at step {len(rows) + 1}: gradient_norm" in late.message
        assert rows[-1]["overflows"] == 8  # those of the first steps, in which the scale is too large, included
    else:
        assert len(rows) == 6


def test_an_error_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an error loses the metrics of the step before it, or hides that this step was not finite."""
    monkeypatch.setattr("mamo.training.guard.reads_late", lambda device: True)
    step = Loop.step

    def fail(self: Loop, batch: Any, number: int) -> Any:
        if number == 3:
            raise OSError("planted")
        return step(self, batch, number)

    monkeypatch.setattr(Loop, "step", fail)
    with pytest.raises(OSError, match="planted"):
        train(config_of(output_dir=str(tmp_path / "a"), training=SHORT), is_resume=False)
    assert [row["step"] for row in run_dir.read_jsonl(tmp_path / "a" / run_dir.METRICS)] == [1, 2, 3]
    monkeypatch.setattr(Loop, "backward", planted(2, "loss"))
    with pytest.raises(NonFiniteLoss, match="not finite at step 3: loss/mlm"):
        train(config_of(output_dir=str(tmp_path / "b"), training=SHORT), is_resume=False)


def test_a_late_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a signal saves before the numbers of the last step are read, or the scale of a step before."""
    training = {**SHORT, "precision": "fp16", "checkpoint_every_steps": 5}
    whole = outcome(tmp_path / "whole", True, training)
    monkeypatch.setattr("mamo.training.guard.reads_late", lambda device: True)
    config = config_of(output_dir=str(tmp_path / "broken"), training=training)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted, match="terminated after step 3, which is saved"):
            train(config, is_resume=False)
    assert len(run_dir.read_jsonl(tmp_path / "broken" / run_dir.METRICS)) == 3
    train(config, is_resume=True)
    broken = Outcome(tmp_path / "broken", "")
    whole.state, broken.state = ({k: v for k, v in one.state.items() if "0006/" in k} for one in (whole, broken))
    broken.assert_equals(whole)


def test_the_wait_for_the_device_is_a_part_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: only the issuing of a step is timed, so that a GPU seems to train many times faster than it does."""
    clock = [0.0]
    read = HostCopy.tolist

    def tick() -> float:
        clock[0] += 1e-4
        return clock[0]

    def slow(self: HostCopy) -> list[float]:
        if not hasattr(self, "has_arrived"):
            self.has_arrived = True  # type: ignore[attr-defined]
            clock[0] += 2.0
        return read(self)

    monkeypatch.setattr("mamo.training.guard.reads_late", lambda device: True)
    monkeypatch.setattr(HostCopy, "tolist", slow)
    monkeypatch.setattr("mamo.training.loop.time", SimpleNamespace(perf_counter=tick))
    config = config_of(output_dir=str(tmp_path), training={**SHORT, "checkpoint_every_steps": 3})
    train(config, is_resume=False)
    rows = run_dir.read_jsonl(tmp_path / "timing.jsonl")
    seconds = [config.training.batch_size_global / row["samples_per_s"] for row in rows]
    assert len(rows) == 6
    assert sum(seconds) == pytest.approx(2.0 * 6, rel=0.01)


def test_held_tensors_forget_what_was_done_to_them() -> None:
    """Bug: 0 times a NaN, which is NaN, is taken off; or a finite step is undone."""
    for found_inf in (torch.tensor(1.0), torch.tensor(0.0), None):
        tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3), nn.Parameter(torch.ones(2, 2))]
        with held(found_inf, tensors), torch.no_grad():
            tensors[0][1] = torch.nan
            tensors[1] += 1
            tensors[2].add_(torch.inf)
        is_held = found_inf is not None and bool(found_inf)
        assert tensors[0].tolist() == ([1.0, 2.0] if is_held else [1.0, pytest.approx(torch.nan, nan_ok=True)])
        assert tensors[1] == (3 if is_held else 4)
        assert torch.equal(tensors[2], torch.ones(2, 2)) == is_held


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "optimizer", "precision"),
    [("ddp", "adamw", "fp16"), ("fsdp", "muon", "bf16")],
)
@pytest.mark.slow
def test_two_processes_hold_what_one_of_them_spoils(
    parallel: str, optimizer: str, precision: str, tmp_path: Path
) -> None:
    """Bug: one process holds its weights and the other moves, or shards, momenta or scalars move in part."""
    training = {"parallel": parallel, "optimizer": optimizer, "precision": precision, "total_steps": 4}
    values = merge(SMALL, {"output_dir": str(tmp_path / "run"), "training": training})
    ended = finish(launch(2, __file__, write_config(tmp_path / "config.yaml", values)))
    assert [code for code, _ in ended] == [0, 0], ended


def spoil_in_one_process(config_file: Path) -> None:
    """Take a step, one whose loss is NaN in the second process, and one more; only the first moves anything."""
    config = load_config(config_file)
    plain, is_spoiled = PretrainTask.losses, False

    def losses(*arguments: Any) -> Any:
        found, metrics = plain(*arguments)
        return ({**found, "mlm": found["mlm"] * torch.nan} if is_spoiled else found), metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamo.training.guard.reads_late", lambda device: True)
        patch.setattr(PretrainTask, "losses", losses)
        run = TrainingRun(config)
        loop = run.loop([])
        if loop.guard.loss_scale is not None:
            loop.guard.loss_scale = LossScale(256.0)  # the first step does not overflow
        run.task.network.train()
        batches, before = run.batches(0, 0), state_of(run)
        first = loop.step(next(batches), 0)
        moved = state_of(run)
        assert all(any(not torch.equal(moved[k], before[k]) for k in before if k.startswith(part)) for part in PARTS)
        is_spoiled = rank() == 1
        second = loop.step(next(batches), 1)
        is_spoiled = False
        third = loop.step(next(batches), 2)
        after = state_of(run)
        assert after.keys() == moved.keys()
        assert [key for key, value in moved.items() if not torch.equal(value, after[key])] == []
        assert loop.read(first)["gradient_norm"] > 0
        for pending in (second, third):
            with pytest.raises(NonFiniteLoss, match=rf"not finite at step {pending.step + 1}: "):
                loop.read(pending)


PARTS = ("student", "teacher", "queue")


def state_of(run: TrainingRun) -> dict[str, Tensor]:
    """This process's part of everything that a step moves."""
    modules = run.task.modules()
    found = {f"{name}/{key}": v for name, module in modules.items() for key, v in module.state_dict().items()}
    for number, state in enumerate(run.optimizer.state.values()):
        found |= {f"optimizer/{number}/{key}": value for key, value in state.items()}
    return {key: (v.to_local() if is_sharded(v) else v).detach().clone() for key, v in found.items()}


def main() -> None:
    """One of several processes."""
    logging.disable(logging.WARNING)
    with process_group("cpu"):
        for file in sys.argv[1:]:
            spoil_in_one_process(Path(file))


if __name__ == "__main__":
    main()
