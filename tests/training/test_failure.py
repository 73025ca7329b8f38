"""A non-finite loss stops the run before the optimizer moves and can be reproduced."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mamo.config.schema import RunConfig
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.registry import load_config
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint
from mamo.training.failure import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("no_curves")


def reproduced(folder: Path) -> dict[str, torch.Tensor]:
    """The losses of the step that failed, from nothing but the folder that the run left."""
    run = TrainingRun(load_config(folder / "config.yaml"))
    for name, module in run.task.modules().items():
        checkpoint.load_module(folder, name, module)
    batch = PairBatch(**checkpoint.read_tensors(folder, "batch"))
    step = json.loads((folder / "state.json").read_text())["step"]
    run.task.network.train()
    return run.dry_run_loop("fp32", folder).backward(batch, step)[1]


def test_a_bad_weight_is_named_and_reproduced(
    tiny: Callable[..., RunConfig], tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Bug: the optimizer spreads NaN over all weights before anybody looks, or the file left lacks the fault."""
    short = {"total_steps": 4, "checkpoint_every_steps": 2}
    train(tiny(output_dir=str(tmp_path / "parent"), training=short), is_resume=False)
    parent = checkpoint.resolve(tmp_path / "parent")
    tensors = {name: checkpoint.read_tensors(parent, name) for name in ("student", "teacher", "queue")}
    tensors["student"]["itm.classifier.bias"][1] = torch.nan
    files = {"tokenizer": parent / "tokenizer", "config.yaml": parent / "config.yaml"}
    state = json.loads((parent / "state.json").read_text())
    checkpoint.write_folder(tmp_path / "poisoned", tensors, state, files)

    config = tiny(checkpoint=str(tmp_path / "poisoned"), training=short)
    message = fails(lambda: train(config, is_resume=False))
    folder = tmp_path / "run" / "non-finite" / "step-0000001"
    assert "not finite at step 1: loss/itm, gradient_norm" in message
    assert str(folder) in message
    batch = checkpoint.read_tensors(folder, "batch")
    assert ", ".join(str(i) for i in batch["sample_id"].tolist()) in message
    for key, value in checkpoint.read_tensors(folder, "student").items():
        assert torch.equal(value.nan_to_num(7.5), tensors["student"][key].nan_to_num(7.5)), key
    losses = reproduced(folder)
    assert losses["loss/itm"].isnan()
    assert all(losses[name].isfinite() for name in losses if name.startswith("loss/") and name != "loss/itm")


def test_a_full_disk_does_not_hide_which_loss_it_was(
    tiny: Callable[..., RunConfig], fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: writing what reproduces the failure fails, and that error alone is told."""
    monkeypatch.setattr(
        "mamo.tasks.pretrain.losses.mim_loss", lambda *given: torch.tensor(torch.nan, requires_grad=True)
    )

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_files", full)
    message = fails(lambda: train(tiny(training={"total_steps": 2}), is_resume=False))
    assert "not finite at step 1: loss/mim" in message
    assert "could not be written" in message


def test_a_loss_that_overflows_later_reproduces_to_the_bit(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the batch of another step, weights of after the step, or other dropout stand in the file."""
    seen: list[dict[str, torch.Tensor]] = []  # first of the dry pass that freezes unused parameters
    losses = PretrainTask.losses

    def overflowing(
        task: PretrainTask, batch: PairBatch, targets: object, start: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        found, metrics = losses(task, batch, targets, start)  # type: ignore[arg-type]
        seen.append({name: value.detach().clone() for name, value in found.items()})
        return ({**found, "mlm": found["mlm"] * torch.inf} if len(seen) == 5 else found), metrics

    monkeypatch.setattr(PretrainTask, "losses", overflowing)
    config = tiny(training={"total_steps": 6, "checkpoint_every_steps": 2})
    with pytest.raises(NonFiniteLoss, match="not finite at step 4: loss/mlm"):
        train(config, is_resume=False)
    monkeypatch.undo()
    folder = tmp_path / "run" / "non-finite" / "step-0000004"
    again = reproduced(folder)
    assert {name: again[f"loss/{name}"].item() for name in seen[4]} == {n: v.item() for n, v in seen[4].items()}
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert checkpoint.resolve(tmp_path / "run").name == "step-0000002"
