"""One process, one with accumulation, two with DDP and two with FSDP take the same 20 steps."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mamo.trainer
from mamo.config.values import merge
from mamo.distributed import process_group
from mamo.models.layers import transformer_layers
from mamo.tasks.registry import build_task, load_config
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint, parallel, run_dir
from mamo.training.parallel import local_batch_sizes
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import values_of, write_config

pytestmark = pytest.mark.usefixtures("no_curves")

ROOT = Path(__file__).parents[2]
NAMES = ("student", "teacher", "queue")
SMALL = values_of(
    data={"text_max_tokens": 16},
    model={"fusion_layers": 2, "dropout": 0.0},
    losses={"queue_size": 11, "itm_pool_size": 2, "itc_soft_target_alpha": 0.4, "mlm_soft_target_alpha": 0.4},
    teacher={"momentum": 0.9},
    training={"total_steps": 20, "checkpoint_every_steps": 10, "learning_rate": 1e-3},
)


def write(folder: Path, evaluation: dict[str, Any] | None = None, **training: Any) -> Path:
    """The config file of a run in `folder`."""
    own = {"output_dir": str(folder / "run"), "training": training, "evaluation": evaluation or {}}
    values = merge(SMALL, own)
    return write_config(folder / "config.yaml", values)


def launch(count: int, *arguments: str | Path, **environment: str) -> list[subprocess.Popen[str]]:
    """Start `count` processes as `torchrun` would, without the time that it takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ, "MPLBACKEND": "Agg", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, what went to stderr except that texts are cut) of each."""
    errors = [process.communicate()[1].splitlines(keepends=True) for process in started]
    lines = ["".join(line for line in several if "are cut there (logged once)" not in line) for several in errors]
    return [(process.returncode, text) for process, text in zip(started, lines)]


def in_float64(config_file: Path) -> None:
    """A run whose weights and casts are float64; the numbers that a log would round go to `losses.pt`."""
    losses: list[dict[str, float]] = []
    with process_group("cpu"):
        run = TrainingRun(load_config(config_file))
        for module in run.task.modules().values():
            module.double()
        loop = run.loop([])
        for step, batch in enumerate(run.batches(0, 0)):
            batch = dataclasses.replace(batch, itm_noise=batch.itm_noise.double())
            values = loop.read(loop.step(batch, step))
            losses.append({name: value for name, value in values.items() if name.startswith("loss/")})
        tensors = checkpoint.snapshot(run.task.modules(), run.optimizer)
    if os.environ.get("RANK", "0") == "0":
        torch.save({"losses": losses, **{name: tensors[name] for name in NAMES}}, config_file.parent / "end.pt")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of losses and of each part of the state."""
    far = dict.fromkeys(("losses", *NAMES), 0.0)
    for mine, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert mine.keys() == theirs.keys()
        far["losses"] = max(far["losses"], *(abs(mine[key] - theirs[key]) for key in mine))
    for name in NAMES:
        assert found[name].keys() == expected[name].keys()
        far[name] = max(float((found[name][k].double() - v.double()).abs().max()) for k, v in expected[name].items())
    return far


def test_every_layout_takes_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: gradients averaged instead of summed, counts or candidates of one process, a teacher that moves twice; Muon
    that steps once a micro-batch. Its iteration rounds to bf16, so that equal steps are not equal bits."""
    layouts: dict[str, dict[str, Any]] = {
        "ddp in parts": {"parallel": "ddp", "micro_batch_size": 2},
        "fsdp in parts": {"parallel": "fsdp", "micro_batch_size": 2},
        "muon, ddp": {"parallel": "ddp", "optimizer": "muon"},
    }
    started = launch(2, __file__, "exact", *(write(tmp_path / name, **training) for name, training in layouts.items()))
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    alone = {
        "one": {}, "accumulated": {"micro_batch_size": 2},
        "muon, one": {"optimizer": "muon"}, "muon, accumulated": {"optimizer": "muon", "micro_batch_size": 2},
    }  # fmt: skip
    for name, training in alone.items():
        in_float64(write(tmp_path / name, **training))
    assert finish(started) == [(0, ""), (0, "")]
    ends = {name: torch.load(tmp_path / name / "end.pt", weights_only=True) for name in (*alone, *layouts)}
    assert len(ends["one"]["losses"]) == 20
    for name in ("accumulated", "ddp in parts", "fsdp in parts"):
        far = differences(ends[name], ends["one"])
        assert max(far.values()) < 1e-8, (name, far)
    for name in ("muon, accumulated", "muon, ddp"):
        far = differences(ends[name], ends["muon, one"])
        assert far["losses"] < 1e-4, (name, far)


def losses_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Every loss of every step, by name."""
    return {f"{row['step']} {name}": row[name] for row in rows for name in row if name.startswith("loss/")}


def test_saved_by_two_loaded_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a checkpoint holds one process's shards, or Adam's state is lost where weights are split or joined; the
    teacher is evaluated by one process's shards."""
    monkeypatch.setattr(mamo.trainer, "write_run_report", lambda *_: None)
    few = {"enabled": True, "network": "teacher", "retrieval_items": 8, "probe_items": 8, "rerank_k": 3}
    files = {name: write(tmp_path / name, few, parallel="fsdp") for name in ("one", "two")}
    started = launch(2, __file__, "train", files["two"])
    train(load_config(files["one"]), is_resume=False)
    assert [code for code, _ in finish(started)] == [0, 0]
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    results = [run_dir.read_evaluations(run)[-1]["metrics"] for run in (one, two)]
    assert results[0] == pytest.approx(results[1])
    rows = [run_dir.read_jsonl(run / run_dir.METRICS) for run in (one, two)]
    assert [row["step"] for row in rows[1]] == list(range(1, 21))  # one process alone writes
    assert losses_of(rows[1]) == pytest.approx(losses_of(rows[0]), abs=1e-4)
    last = checkpoint.step_folder(two, 20)
    for name in (*NAMES, "optimizer"):
        expected = checkpoint.read_tensors(checkpoint.step_folder(one, 20), name)
        found = checkpoint.read_tensors(last, name)
        assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
    for name in ("checkpoints/step-0000020", "checkpoints/last"):
        target = two / name
        target.unlink() if target.is_symlink() else target.rename(two / "later")
    train(load_config(files["two"]), is_resume=True)  # from step 10, in one process
    again = run_dir.read_jsonl(two / run_dir.METRICS)
    assert losses_of(again) == pytest.approx(losses_of(rows[0]), abs=1e-4)


def batch_sizes(config_file: Path) -> tuple[int, int]:
    """Samples of a process in a step and in a pass, with the pools of the config's losses."""
    config = load_config(config_file)
    task = build_task(config, scenes_tokenizer())
    return local_batch_sizes(config.training, task.unit, task.unit_key)


@pytest.mark.parametrize(
    ("world", "training", "message"),
    [
        (3, {}, "training.batch_size_global: 8 does not divide by 3 processes"),
        (8, {}, "losses.itm_pool_size: 2 does not divide the 1 samples of a forward pass"),
        (2, {"batch_size_global": 12, "micro_batch_size": 4}, "training.micro_batch_size: 4 does not divide the 6"),
    ],
)
def test_shares_that_do_not_divide_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, training: dict[str, Any], message: str
) -> None:
    """Bug: a pool of negatives straddles two processes, which then train on other pairs than one process does."""
    config = write(tmp_path, **training)
    monkeypatch.setattr(parallel, "world_size", lambda: world)
    with pytest.raises(ValueError, match=message):
        batch_sizes(config)


def test_shares_follow_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a process takes the whole global batch; a micro-batch of the config is larger than a process's share."""
    config = write(tmp_path, micro_batch_size=4)
    assert batch_sizes(config) == (8, 4)
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    assert batch_sizes(config) == (2, 2)


def gradients_of(config_file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of the first step."""
    run = TrainingRun(load_config(config_file))
    run.task.network.train()
    precision = run.config.training.precision
    assert precision != "auto"
    _, values = run.dry_run_loop(precision, config_file.parent).backward(next(run.batches(0, 0)), 0)
    return values, {n: p.grad for n, p in run.task.network.named_parameters() if p.grad is not None}


def test_checkpointed_and_compiled_blocks_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: recomputed blocks draw other dropout or read other weights; a block is neither compiled nor checkpointed."""
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or real(f, backend="aot_eager"))
    plain = write(tmp_path / "plain")
    both = write(tmp_path / "both", activation_checkpointing=True, compile=True)
    (values, gradients), (found, others) = gradients_of(plain), gradients_of(both)
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-2)
    torch.testing.assert_close(others, gradients, atol=1e-5, rtol=1e-4)
    assert len(compiled) == 2 * (1 + 1 + 2)  # student and teacher, layers
    network = TrainingRun(load_config(plain)).task.network
    assert len(transformer_layers(network)) == 4


def test_gradients_of_ddp_are_views_of_its_buckets(tmp_path: Path) -> None:
    """Bug: each gradient is kept twice, once for the optimizer and once for the sum over processes."""
    run = TrainingRun(load_config(write(tmp_path)))
    loop, batch = run.dry_run_loop("fp32", tmp_path), next(run.batches(0, 0))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        loop.strategy = parallel.DDP(run.config, run.task)
        loop.backward(batch, 0)
        gradients = [parameter.grad for parameter in run.task.network.parameters() if parameter.grad is not None]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        assert len(storages) < len(gradients) / 4
    finally:
        dist.destroy_process_group()


def main() -> None:
    """One of several processes; it runs one config after the other."""
    kind, *files = sys.argv[1:]
    if kind == "exact":
        Tensor.float = Tensor.double  # type: ignore[method-assign, assignment]
        with process_group("cpu"):
            for file in files:
                in_float64(Path(file))
    else:
        mamo.trainer.plot_curves = mamo.trainer.write_run_report = lambda *_: None
        train(load_config(Path(files[0])), is_resume=False)


if __name__ == "__main__":
    main()
