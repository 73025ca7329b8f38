"""`--plan`: what a run will cost, measured on the machine that will pay; nothing is kept or written.

Legend: B batch (one micro-batch here), L text tokens, P patches.
"""

import itertools
import math
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.data.collate import Batch
from mamo.trainer import TrainingRun, resolve_auto_settings
from mamo.training.loop import Loop

TIMED_STEPS = 3
FP32_BYTES = 4


def print_estimate(config: RunConfig) -> None:
    """Print parameters, operations, bytes, memory, steps, tokens, measured seconds a step and the hours that follow.

    Raises:
        ValueError: a mistake in the config, the data or the checkpoint, as the run itself would raise it.
    """
    run = TrainingRun(config)
    if "auto" in (config.training.precision, config.training.device):
        run = resolve_auto_settings(run)
    with tempfile.TemporaryDirectory() as scratch:  # where a non-finite loss would leave its file
        precision = run.config.training.precision
        assert precision != "auto"
        loop = run.dry_run_loop(precision, Path(scratch))
        print("\n".join(plan(run, loop)), flush=True)
        print("\n".join(measure(run, loop)))


def plan(run: TrainingRun, loop: Loop) -> list[str]:
    """Return the lines that need no clock: a table of parameters, then costs of a sample and of the run."""
    training = run.config.training
    table = parameter_table(run.task.modules())
    width = max(len(name) for name in table)
    lines = ["parameters", *(f"  {name:<{width}} {count:>13,}" for name, count in table.items()), ""]
    batch = run.example_batch(loop.micro_batch_size)
    n_bytes = batch_bytes(batch)
    batch = batch.to(run.device)
    operations = count_operations(lambda: loop.backward(batch, 0))
    run.task.network.zero_grad(set_to_none=True)
    peak = peak_bytes(lambda: loop.backward(batch, 0))
    run.task.network.zero_grad(set_to_none=True)
    memory = memory_bytes(run, peak + n_bytes)
    samples = training.total_steps * training.batch_size_global
    encoder = run.task.image_encoder
    n_images = math.prod(batch.image.shape[1:-3])  # [B, 3, H, W], or [B, images, 3, H, W]
    n_image_tokens = n_images * (encoder.num_prefix_tokens + encoder.grid[0] * encoder.grid[1])
    n_text_tokens = float(batch.is_valid.sum()) / len(batch)
    return [
        *lines,
        f"device {run.device}, precision {training.precision}, image {run.config.data.image_size} px",
        f"a step: {training.batch_size_global} samples in micro-batches of {loop.micro_batch_size}",
        f"operations a sample: {operations / len(batch) / 1e9:.3f} GFLOP (forward and backward of all passes; a "
        "multiplication and an addition count as two)",
        f"bytes a sample as loaded: {n_bytes / len(batch):,.0f}",
        f"peak memory, estimated: {sum(memory.values()) / 2**20:,.0f} MiB ("
        + ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in memory.items())
        + "), without the libraries and loader processes",
        f"steps: {training.total_steps:,}",
        f"samples: {samples:,} ({samples / len(run.source):.2f} epochs of {len(run.source):,})",
        f"text tokens: {samples * n_text_tokens:,.0f} ({n_text_tokens:.1f} a caption)",
        f"image tokens: {samples * n_image_tokens:,} ({n_image_tokens} a sample)",
    ]


def measure(run: TrainingRun, loop: Loop) -> list[str]:
    """Time loading and whole steps, and estimate the hours; the weights that move are thrown away."""
    data, training = run.config.data, run.config.training
    started = time.perf_counter()
    batches = list(itertools.islice(run.batches(0, workers=0), TIMED_STEPS))
    load_s = (time.perf_counter() - started) / len(batches)
    run.task.network.train()
    durations = []
    for step, batch in enumerate([batches[0], *batches]):  # the first warms up
        started = time.perf_counter()
        loop.step(batch.to(run.device), step)  # reads the losses back, so the device has finished
        durations.append(time.perf_counter() - started)
    step_s = sorted(durations[1:])[len(batches) // 2]
    whole_s = max(step_s, load_s / data.workers) if data.workers else step_s + load_s
    hours = whole_s * training.total_steps / 3600
    return [
        f"measured: {step_s:.3f} s a step, {load_s:.3f} s to load its batch in one process ({data.workers} workers)",
        f"so {whole_s:.3f} s a step, {training.batch_size_global / whole_s:.1f} samples/s: "
        f"{hours:.2f} hours ({hours * 60:.1f} minutes) for {training.total_steps:,} steps, without evaluation",
    ]


def parameter_table(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Number of parameters of a task's modules, the network's by part.

    A shared weight counts where it first appears, so the rows before `total` add up to it.
    """
    network = modules["student"]
    names: dict[str, str] = {}
    for name, _ in network.named_parameters():
        first, second = (*name.split("."), "")[:2]
        part = second if first == "backbone" else f"head {first}" if second else first
        names[name] = "projections" if part in ("image_projection", "text_projection") else part
    table = dict.fromkeys(names.values(), 0)
    for name, parameter in network.named_parameters():
        table[names[name]] += parameter.numel()
    total, trainable = sum(table.values()), sum(p.numel() for p in network.parameters() if p.requires_grad)
    table |= {"total": total, "of these trainable": trainable}
    if "teacher" in modules:
        table["teacher (a copy)"] = sum(p.numel() for p in modules["teacher"].parameters())
    return table


def count_operations(work: Callable[[], object]) -> int:
    """Count the operations of the matrix products, convolutions and attention in `work`, backward included."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # attention as plain products: counted alike on every device
        work()
    return int(counter.get_total_flops())


def peak_bytes(work: Callable[[], object]) -> int:
    """Return most bytes of tensors made by `work` that live at one time: activations, gradients, copies, temporaries.

    Each storage counts once, from the operation that makes it until its last tensor is gone; what an operation uses
    inside is not seen.
    """
    live = _LiveBytes()
    with live:
        work()
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Values | None = None,
    ) -> object:
        kwargs = kwargs or {}
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        for storage in _storages(result):
            key = storage._cdata
            if key not in known and key not in self.sizes:  # else a view, or in place
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory_bytes(run: TrainingRun, micro_batch: int) -> dict[str, int]:
    """Estimate the peak memory of a step in bytes; `micro_batch` is the need of one besides weights and Adam."""
    network = run.task.network
    others = {name: module for name, module in run.task.modules().items() if module is not network}
    n_trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {
        "weights": sum(p.numel() for p in network.parameters()) * FP32_BYTES,
        "Adam": n_trainable * 2 * FP32_BYTES,
        **{
            name: sum(p.numel() for p in module.parameters()) * FP32_BYTES
            + sum(b.numel() * b.element_size() for b in module.buffers())
            for name, module in others.items()
        },
        "micro-batch and gradients": micro_batch,
    }


def batch_bytes(batch: Batch) -> int:
    """Return bytes of a batch as the loader hands it over."""
    return sum(tensor.numel() * tensor.element_size() for tensor in batch.tensors().values())
