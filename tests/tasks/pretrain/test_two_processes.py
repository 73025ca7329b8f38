"""Two processes with half of the batch each take the same two steps as one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mamo.data.pairs import Sample, hash_id
from mamo.distributed import all_reduce_sum, rank, world_size
from mamo.tasks.pretrain.task import PretrainTask
from mamo.world.vocabulary import scenes_tokenizer
from tests.tiny import config_of

IMAGE_IDS = (0, 1, 2, 2, 3, 4, 0, 5)  # images 0 and 2 twice, image 0 once in each half
CAPTIONS = (
    "a red circle", "two circles", "one", "a green triangle left of a small red square",
    "two circles", "a large blue square above a small green circle", "three", "one small yellow circle",
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "model": {"dropout": 0.0},
    "losses": {"itm_pool_size": 2, "queue_size": 11, "itc_soft_target_alpha": 0.4},
    "teacher": {"momentum": 0.6},
    "training": {"batch_size_global": 8, "total_steps": 10, "warmup_steps": 0},
}


def two_steps() -> dict[str, Tensor]:
    """Losses, gradients, teacher and queue of two steps; in each, this process sees its share of the batch."""
    task = PretrainTask(config_of(**CONFIG), scenes_tokenizer())
    for module in task.modules().values():
        module.double()
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    samples = [
        Sample(images[image_id], caption, image_id, hash_id(caption), row, ())
        for row, (image_id, caption) in enumerate(zip(IMAGE_IDS, CAPTIONS))
    ]
    share = len(samples) // world_size()
    results: dict[str, Tensor] = {}
    for step in range(2):
        batch = task.collator([(step, sample) for sample in samples[rank() * share : (rank() + 1) * share]])
        targets, _ = task.compute_targets(batch, share, step)
        losses, metrics = task.losses(batch, targets, 0)
        sum(losses.values()).backward()
        results |= {f"{step} {name}": all_reduce_sum(value.double()) for name, value in (losses | metrics).items()}
        for name, parameter in task.network.named_parameters():
            results[f"{step} gradient of {name}"] = all_reduce_sum(parameter.grad)
            with torch.no_grad():
                parameter.sub_(0.1 * results[f"{step} gradient of {name}"])
            parameter.grad = None
        task.on_optimizer_step(batch, targets, step)
    for module in ("teacher", "queue"):
        results |= {f"{module} {name}": value for name, value in task.modules()[module].state_dict().items()}
    return results


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: Any) -> None:
    """Bug: candidates, counts or queue of one process alone; ids of the wrong rank; shares that do not add up."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    processes = [
        subprocess.Popen([sys.executable, __file__, str(number), str(tmp_path)], env=environment) for number in (0, 1)
    ]
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # see `main`
    expected = two_steps()
    assert [process.wait() for process in processes] == [0, 0]
    for number in (0, 1):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-8, rtol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
            )


def main() -> None:
    """One of the two processes; what computes in fp32 by a cast computes in float64, so that 1e-8 can be asked for."""
    number, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=number, world_size=2)
    Tensor.float = Tensor.double
    torch.save(two_steps(), folder / f"{number}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
