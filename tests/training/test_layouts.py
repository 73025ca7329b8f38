"""One process, one with accumulation, two with DDP and two with FSDP take the same 20 steps."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mamo.config import load_config
from mamo.tasks.launch import Run, restore, train
from mamo.training import checkpoint, run_folder
from mamo.training.distributed import processes, rank
from mamo.training.parallel import blocks, shares
from mamo.training.precision import computing_in

pytestmark = pytest.mark.usefixtures("no_curves", "one_thread")

ROOT = Path(__file__).parents[2]
NAMES = ("student", "teacher", "queue")
SMALL = {
    "seed": 3,
    "data": {"train_scenes": 50, "image_size_px": 16, "text_max_tokens": 16, "workers": 0},
    "model": {
        "image": {"width": 16, "depth": 1, "heads": 2, "patch_size_px": 8},
        "text": {"width": 16, "heads": 2, "mlp_width": 32, "layers": 1},
        "fusion_layers": 2,
        "itc_width": 8,
        "dropout": 0.0,
    },
    "losses": {"queue_size": 11, "itm_pool_size": 2, "itc_soft_target_alpha": 0.4},
    "teacher": {"momentum": 0.9},
    "training": {
        "total_steps": 20,
        "batch_size_global": 8,
        "warmup_steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "checkpoint_every_steps": 10,
        "learning_rate": 1e-3,
    },
    "evaluation": {"enabled": False},
}


def write(folder: Path, **training: Any) -> Path:
    """The config file of a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**SMALL, "output_dir": str(folder / "run"), "training": {**SMALL["training"], **training}}  # type: ignore[dict-item]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def launch(count: int, *arguments: str | Path, **environment: str) -> list[subprocess.Popen[str]]:
    """Start `count` processes as `torchrun` would, without the time that it takes."""
    with subprocess.Popen(["true"]):
        pass
    store = subprocess.run(
        [sys.executable, "-c", "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store, "WORLD_SIZE": str(count), **environment,
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
    """(exit code, what went to stderr) of each."""
    return [(process.wait(), errors) for process in started for errors in [process.communicate()[1]]]


def in_float64(config_file: Path) -> None:
    """A run whose weights and casts are float64; the numbers that a log would round go to `losses.pt`."""
    losses: list[dict[str, float]] = []
    with processes("cpu"):
        run = Run(load_config(config_file))
        for module in run.task.modules().values():
            module.double()
        loop = run.loop([])
        for step, batch in enumerate(run.batches(0, 0)):
            batch = dataclasses.replace(batch, itm_noise=batch.itm_noise.double())
            values = loop.step(batch, step)
            losses.append({name: value for name, value in values.items() if name.startswith("loss/")})
        tensors = checkpoint.snapshot(run.task.modules(), run.optimizer)
    if rank() == 0 and os.environ.get("RANK", "0") == "0":
        torch.save({"losses": losses, **{name: tensors[name] for name in NAMES}}, config_file.parent / "end.pt")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of losses and of each part of the state."""
    far = {name: 0.0 for name in ("losses", *NAMES)}
    for mine, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert mine.keys() == theirs.keys()
        far["losses"] = max(far["losses"], *(abs(mine[key] - theirs[key]) for key in mine))
    for name in NAMES:
        assert found[name].keys() == expected[name].keys()
        far[name] = max(float((found[name][k].double() - v.double()).abs().max()) for k, v in expected[name].items())
    return far


def test_every_layout_takes_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: gradients averaged instead of summed, counts or candidates of one process, a teacher that moves twice."""
    two = {engine: launch(2, __file__, write(tmp_path / engine, parallel=engine)) for engine in ("ddp", "fsdp")}
    two["fsdp in two parts"] = launch(2, __file__, write(tmp_path / "parts", parallel="fsdp", micro_batch_size=2))
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    in_float64(write(tmp_path / "one"))
    in_float64(write(tmp_path / "accumulated", micro_batch_size=2))
    expected = torch.load(tmp_path / "one" / "end.pt", weights_only=True)
    assert len(expected["losses"]) == 20
    for started in two.values():
        assert finish(started) == [(0, ""), (0, "")]
    for name in ("accumulated", "ddp", "fsdp", "parts"):
        far = differences(torch.load(tmp_path / name / "end.pt", weights_only=True), expected)
        assert max(far.values()) < 1e-8, (name, far)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Tensor.float = Tensor.double  # type: ignore[method-assign, assignment]
    in_float64(Path(sys.argv[1]))
