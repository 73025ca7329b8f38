"""`--plan`: what a run will cost, measured on the machine that will pay; nothing is kept or written.

Legend: B batch (one micro-batch here), L text tokens, P patches.
"""

import math
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mamo.config.images import ImageEncoderConfig
from mamo.config.schema import MamoModelConfig, RunConfig
from mamo.config.values import Values
from mamo.data.collate import Batch
from mamo.data.loader import count_workers
from mamo.trainer import TrainingRun, resolve_auto_settings
from mamo.training.loop import Loop
from mamo.training.memory import free_bytes, memory_errors
from mamo.training.parallel import local_batch_sizes

TIMED_STEPS = 3
FP32_BYTES = 4
SMALL_BATCH = 8
"""Samples that are measured of a large micro-batch, at least."""
MEASURED_S = 2.0
"""Longest forecast of the passes over a whole micro-batch that are then timed."""
MOST_LAYERS = 1000
HELD_SHARE, HELD_BYTES = 0.22, 48 * 2**20
"""Memory of a CPU besides living tensors, as shares of the micro-batch's and in bytes: gaps between blocks, buffers of
matrix products, and code of the libraries that is first used in a step. Fitted to what `tiny` takes."""


def print_estimate(config: RunConfig) -> None:
    """Print parameters, operations, bytes, memory, steps, tokens, measured seconds a step and the hours that follow.

    The estimate is printed first. A small batch is measured, and nothing that needs over half of the free memory.

    Raises:
        ValueError: a mistake in the config, the data or the checkpoint, as the run itself would raise it; a network or
            a micro-batch that needs over half of the free memory.
    """
    with memory_errors(config):
        check_sizes(config)
        run = TrainingRun(config)
        if "auto" in (config.training.precision, config.training.device):
            resolve_auto_settings(run, measured_size(run))
        with tempfile.TemporaryDirectory() as scratch:  # where a non-finite loss would leave its file
            precision = run.config.training.precision
            assert precision != "auto"
            loop = run.dry_run_loop(precision, Path(scratch))
            lines, needed = plan(run, loop)
            print("\n".join(lines), flush=True)
            free = free_bytes(run.device)
            if needed > free / 2:
                raise ValueError(
                    f"nothing was measured: the estimated {needed / 2**20:,.0f} MiB are more than half of the "
                    f"{free / 2**20:,.0f} MiB that are free; lower training.micro_batch_size (now "
                    f"{loop.micro_batch_size:,}) or plan on the machine that will train"
                )
            print("\n".join(measure(run, loop)))


def check_sizes(config: RunConfig) -> None:
    """Refuse a network too large to be built for an estimate, before anything is built.

    Raises:
        ValueError: names the section and the least memory that it needs.
    """
    model, free = config.model, free_bytes(torch.device("cpu"))
    image, layers = getattr(model, "image", None), {"model.text.layers": model.text.layers}
    text_layer = 4 * model.text.width**2 + 2 * model.text.width * model.text.mlp_width
    weights = {"model.text": model.text.layers * text_layer}
    if isinstance(model, MamoModelConfig):
        layers["model.fusion_layers"] = model.fusion_layers
        weights["model.fusion_layers"] = model.fusion_layers * text_layer
    if isinstance(image, ImageEncoderConfig):
        layers["model.image.depth"] = image.depth or 0
        weights["model.image"] = 12 * (image.width or 0) ** 2 * (image.depth or 1)
    for key, number in layers.items():
        if number > MOST_LAYERS:
            raise ValueError(f"{key}: {number:,} layers are not planned; use at most {MOST_LAYERS:,}")
    needs = {key: 4 * FP32_BYTES * number for key, number in weights.items()}  # weights, gradients and Adam's moments
    patch = getattr(image, "patch_size_px", None) or 2 ** getattr(model, "embedder_layers", 4)
    height, width = config.data.image_size
    needs["data.image_size_px"] = 2 * (height * width // patch**2) ** 2 * FP32_BYTES  # one attention map of two images
    for key, number in needs.items():
        if number > free / 2:
            raise ValueError(
                f"{key}: needs at least {number / 2**30:,.0f} GiB, more than half of the {free / 2**30:,.1f} GiB that "
                "are free: make it smaller, or plan on the machine that will train"
            )


def measured_size(run: TrainingRun) -> int:
    """Return the samples of the batch that is measured: the micro-batch, or some that fit into it if it is large."""
    _, micro = local_batch_sizes(run.config.training, run.task.unit, run.task.unit_key)
    small = run.task.unit * math.ceil(SMALL_BATCH / run.task.unit)
    return small if micro > 4 * small else micro


@dataclass(frozen=True, slots=True)
class PassCost:
    """Cost of the passes over a micro-batch."""

    operations: float
    peak_bytes: float
    """Of what the passes make."""
    loaded_bytes: float
    text_tokens: float

    def at(self, size: int, other: "PassCost", other_size: int, wanted: int) -> "PassCost":
        """Extrapolate the costs of `size` and `other_size` samples to `wanted`."""
        share = (wanted - size) / (other_size - size)
        pairs = zip(astuple(self), astuple(other))
        return PassCost(*(mine + share * (theirs - mine) for mine, theirs in pairs))


def pass_cost(run: TrainingRun, loop: Loop, size: int) -> PassCost:
    """Run the passes over the first samples, twice."""
    batch = run.example_batch(size)
    n_bytes, n_tokens = batch_bytes(batch), float(batch.is_valid.sum())
    batch = batch.to(run.device)
    operations = count_operations(lambda: loop.backward(batch, 0))
    run.task.network.zero_grad(set_to_none=True)
    peak = peak_bytes(lambda: loop.backward(batch, 0))
    run.task.network.zero_grad(set_to_none=True)
    return PassCost(operations, peak, n_bytes, n_tokens)


def plan(run: TrainingRun, loop: Loop) -> tuple[list[str], int]:
    """Return the lines that need no clock: parameters, then costs of a sample and of the run; and the bytes of memory.

    The costs of a large micro-batch are extrapolated from those of two small ones.
    """
    training = run.config.training
    table = parameter_table(run.task.modules())
    width = max(len(name) for name in table)
    lines = ["parameters", *(f"  {name:<{width}} {count:>13,}" for name, count in table.items()), ""]
    micro, size = loop.micro_batch_size, measured_size(run)
    cost = pass_cost(run, loop, size)
    if size < micro:
        cost = cost.at(size, pass_cost(run, loop, 2 * size), 2 * size, micro)
    memory = memory_bytes(run, int(cost.peak_bytes + cost.loaded_bytes))
    samples = training.total_steps * training.batch_size_global
    encoder = run.task.image_encoder
    n_images = math.prod(run.example_batch(size).image.shape[1:-3])  # [B, 3, H, W], or [B, images, 3, H, W]
    n_image_tokens = n_images * (encoder.num_prefix_tokens + encoder.grid[0] * encoder.grid[1])
    n_text_tokens = cost.text_tokens / micro
    return [
        *lines,
        f"device {run.device}, precision {training.precision}, image {run.config.data.image_size} px",
        f"a step: {training.batch_size_global} samples in micro-batches of {micro}",
        f"operations a sample: {cost.operations / micro / 1e9:.3f} GFLOP (forward and backward of all passes; a "
        "multiplication and an addition count as two)",
        f"bytes a sample as loaded: {cost.loaded_bytes / micro:,.0f}",
        f"peak memory, estimated: {sum(memory.values()) / 2**20:,.0f} MiB ("
        + ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in memory.items())
        + "), without the libraries and loader processes",
        f"steps: {training.total_steps:,}",
        f"samples: {samples:,} ({samples / len(run.source):.2f} epochs of {len(run.source):,})",
        f"text tokens: {samples * n_text_tokens:,.0f} ({n_text_tokens:.1f} a caption)",
        f"image tokens: {samples * n_image_tokens:,} ({n_image_tokens} a sample)",
    ], sum(memory.values())


def measure(run: TrainingRun, loop: Loop) -> list[str]:
    """Time loading and steps, and estimate the hours; the weights that move are thrown away.

    A micro-batch is timed that is small, and then the run's own if that takes at most `MEASURED_S`.
    """
    data, training = run.config.data, run.config.training
    local, micro = local_batch_sizes(training, run.task.unit, run.task.unit_key)
    size = measured_size(run)
    passes_s, optimizer_s, load_s = time_steps(run, loop, size)
    if size < micro and passes_s * micro / size < MEASURED_S:
        size = micro
        passes_s, optimizer_s, load_s = time_steps(run, loop, size)
    step_s, load_s = passes_s * local / size + optimizer_s, load_s * local / size
    workers = count_workers(data.workers, run.device.type)
    whole_s = max(step_s, load_s / workers) if workers else step_s + load_s
    hours = whole_s * training.total_steps / 3600
    return [
        f"measured: {step_s:.3f} s a step, {load_s:.3f} s to load its batch in one process ({workers} workers)"
        + (f", from {size:,} samples" if size < local else ""),
        f"so {whole_s:.3f} s a step, {training.batch_size_global / whole_s:.1f} samples/s: "
        f"{hours:.2f} hours ({hours * 60:.1f} minutes) for {training.total_steps:,} steps, without evaluation",
    ]


def time_steps(run: TrainingRun, loop: Loop, size: int) -> tuple[float, float, float]:
    """Return the median seconds of the passes over `size` samples, of the rest of a step, and of loading them."""
    run.task.network.train()
    started = time.perf_counter()
    batch = run.example_batch(size)
    load_s = time.perf_counter() - started
    batch = batch.to(run.device)
    passes, steps = [], []
    for step in range(TIMED_STEPS + 1):  # the first warms up
        started = time.perf_counter()
        loop.backward(batch, step)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        passes.append(time.perf_counter() - started)
        run.task.network.zero_grad(set_to_none=True)
        started = time.perf_counter()
        loop.step(batch, step)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - started)
    passes_s = statistics.median(passes[1:])
    return passes_s, max(0.0, statistics.median(steps[1:]) - passes_s), load_s


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
    held = {"held besides": int(HELD_SHARE * micro_batch) + HELD_BYTES} if run.device.type == "cpu" else {}
    return {
        "weights": sum(p.numel() for p in network.parameters()) * FP32_BYTES,
        "Adam": n_trainable * 2 * FP32_BYTES,
        **{
            name: sum(p.numel() for p in module.parameters()) * FP32_BYTES
            + sum(b.numel() * b.element_size() for b in module.buffers())
            for name, module in others.items()
        },
        "micro-batch and gradients": micro_batch,
        **held,
    }


def batch_bytes(batch: Batch) -> int:
    """Return bytes of a batch as the loader hands it over."""
    return sum(tensor.numel() * tensor.element_size() for tensor in batch.tensors().values())
