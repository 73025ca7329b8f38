"""Measure the pre-training step against its floor and a textbook step, and the share of each of its parts."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mamo.benchmark.cases import Case, build_case
from mamo.benchmark.products import Products
from mamo.benchmark.textbook import Textbook
from mamo.benchmark.timing import Rounds, seconds, square_rate, synchronise
from mamo.config.values import Values
from mamo.tasks.base import Task
from mamo.tasks.objective import ObjectiveTask
from mamo.tasks.pretrain.batch import PairBatch
from mamo.tasks.pretrain.task import PretrainTask
from mamo.training.loop import Loop
from mamo.training.precision import Precision


def measure_step(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure seconds per step, samples per second, floor, shares and the ratio to the textbook step.

    `step/PRESET/PRECISION` are the five losses of MAMO, in `precision` and on a CPU in fp32; `step/PRESET/albef` is
    ALBEF's config in fp32. Keys without a precision are those of `precision`.
    """
    found: dict[str, float] = {}
    for name in precisions_of(device, precision):
        found |= _step_in(name, case, folder, device).summary(f"step/{case.preset}/{name}")
    albef = _step_in("fp32", replace(case, method="albef"), folder, device)
    found |= albef.summary(f"step/{case.preset}/albef")
    return found | without_precision(found, f"step/{case.preset}", precision)


def precisions_of(device: torch.device, precision: Precision) -> list[Precision]:
    """Return the precisions to measure: `precision`, and on a CPU fp32."""
    return list(dict.fromkeys(("fp32", precision))) if device.type == "cpu" else [precision]


def without_precision(found: dict[str, float], prefix: str, precision: Precision) -> dict[str, float]:
    """Return the numbers of `PREFIX/PRECISION/...` as `PREFIX/...`."""
    named = f"{prefix}/{precision}/"
    return {f"{prefix}/{key.removeprefix(named)}": value for key, value in found.items() if key.startswith(named)}


def _step_in(precision: Precision, case: Case, folder: Path, device: torch.device) -> Rounds:
    """Measure in turns our step and the textbook's three losses of ALBEF, in fp32 and in `precision`."""
    _, loop, batch = build_case(case, folder, device, precision)
    book = textbook_of(case, folder, device)
    products = Products(lambda: loop.backward(batch, 0), device)
    loop.task.network.zero_grad(set_to_none=True)
    ways: dict[str, Callable[[int], object]] = {"step_s": lambda step: loop.step(batch, step)}
    for other in dict.fromkeys(("fp32", precision)):
        ways[f"textbook_{other}_s"] = lambda step, other=other: book.step(batch, other)  # type: ignore[misc]
    rounds = Rounds()
    for step in range(case.rounds + 1):
        # the step is timed between two measurements of its floor, as the speed of the machine may change
        before, rate = products.seconds(), square_rate(device, precision, case.square_side)
        order = list(ways)[:: 1 if step % 2 else -1]
        spent = {name: seconds(lambda: ways[name](step), device) for name in order}  # noqa: B023 (called at once)
        if step == 0:
            continue  # warm-up: kernels are chosen, the optimizers' states are allocated
        floor_s = (before + products.seconds()) / 2
        step_s = spent["step_s"]
        rounds.add(
            **spent,
            samples_per_s=len(batch) / step_s,
            floor_s=floor_s,
            share_of_matrix_rate=floor_s / step_s,
            share_of_square_rate=products.operations / rate / step_s,
            matrix_tflop_per_s=rate / 1e12,
            gflop_per_image=products.operations / len(batch) / 1e9,
            over_textbook=step_s / spent["textbook_fp32_s"],
        )
        if precision != "fp32":
            rounds.add(over_textbook_in_this_precision=step_s / spent[f"textbook_{precision}_s"])
    return rounds


def textbook_of(case: Case, folder: Path, device: torch.device) -> Textbook:
    """Build the textbook step of ALBEF's three losses at the shapes of `case`."""
    run, _, _ = build_case(replace(case, method="albef"), folder, device, "fp32")
    assert isinstance(run.task, PretrainTask)
    return Textbook(run.task)


def measure_passes(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure the share of the step of each pass and each module.

    The target pass and the work after the backward pass are timed directly. The online passes share the encodings of
    the clean image and caption: the cost of one is the time that a step saves without its losses; `shared` is the rest.
    """
    _, loop, batch = build_case(case, folder, device, precision)
    weights = dict(loop.task.weights)
    passes, modules = Rounds(), Rounds()
    for number in range(case.rounds + 1):
        target, forward, backward = _three_parts(loop, batch, weights)
        whole = seconds(lambda: loop.step(batch, 1), device)
        parts: dict[str, float] = {}
        for name, dropped in losses_by_pass(loop.task).items():
            kept = {key: weight for key, weight in weights.items() if key not in dropped}
            _, without_forward, without_backward = _three_parts(loop, batch, kept)
            parts[f"{name}_forward"] = forward - without_forward
            parts[f"{name}_backward"] = backward - without_backward
        by_module = _module_seconds(loop, batch, device)
        if number == 0:
            continue
        online = target + forward + backward
        passes.add(
            target=target / whole,
            **{name: value / whole for name, value in parts.items()},
            shared=(forward + backward - sum(parts.values())) / whole,
            after_backward=1 - online / whole,
        )
        modules.add(**{name: value / online for name, value in by_module.items()})
        modules.add(target=target / online, other=1 - (target + sum(by_module.values())) / online)
    return passes.summary(f"passes/{case.preset}/share") | modules.summary(f"modules/{case.preset}/share")


def losses_by_pass(task: Task) -> dict[str, list[str]]:
    """Group a task's losses by the masked pass whose fused tokens they read; the others match clean pairs."""
    assert isinstance(task, ObjectiveTask)
    passes: dict[str, list[str]] = {"masked_image": [], "masked_text": [], "matching": []}
    for loss in task.active:
        masked = {"fused_patches": "masked_image", "fused_words": "masked_text"}
        passes[next((masked[view] for view in loss.reads if view in masked), "matching")].append(loss.name)
    return passes


def _three_parts(loop: Loop, batch: PairBatch, weights: Mapping[str, float]) -> tuple[float, float, float]:
    """Measure the seconds of the target pass, the online forward passes and the backward pass, for these losses."""
    task, device = loop.task, loop.device
    assert isinstance(task, ObjectiveTask)
    before = task.weights, task.active, task.schedule
    task.keep_losses(weights)
    kept: Values = {}

    def prepare() -> None:
        kept["targets"], _ = task.compute_targets(batch, len(batch), 0)

    def forward() -> None:
        losses, _ = task.losses(batch, kept["targets"], 0)
        kept["loss"] = torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    with loop.strategy.precision_context():
        target_s, forward_s = seconds(prepare, device), seconds(forward, device)
        backward_s = seconds(lambda: kept["loss"].backward(), device)
    task.weights, task.active, task.schedule = before
    task.network.zero_grad(set_to_none=True)
    return target_s, forward_s, backward_s


def _module_seconds(loop: Loop, batch: PairBatch, device: torch.device) -> dict[str, float]:
    """Measure the seconds in each part of the online network, forward and backward, of one step."""
    spent: dict[str, float] = {}
    with timing_modules(module_groups(loop.task.network), device, spent):
        loop.backward(batch, 0)
    loop.task.network.zero_grad(set_to_none=True)
    return spent


def module_groups(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Group the modules to time: the transformer layers of both encoders and of the fusion, and the heads."""
    backbone: Any = network.backbone
    return {
        "image_encoder": list(backbone.image_encoder.layers),
        "text_encoder": list(backbone.text_encoder.layers),
        "fusion": list(backbone.fusion.layers),
        "heads": [head for name, head in network.named_children() if name != "backbone"],
    }


@contextmanager
def timing_modules(
    parts: Mapping[str, list[nn.Module]], device: torch.device, spent: dict[str, float]
) -> Iterator[None]:
    """Collect in `spent` the seconds of `NAME_forward` and `NAME_backward` of each part within the block."""
    handles: list[RemovableHandle] = []
    started: dict[str, float] = {}

    def start(key: str) -> Callable[..., None]:
        def hook(*_: Tensor) -> None:
            synchronise(device)
            started[key] = time.perf_counter()

        return hook

    def stop(key: str) -> Callable[..., None]:
        def hook(*_: Tensor) -> None:
            synchronise(device)
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - started[key]

        return hook

    for name, modules in parts.items():
        for module in modules:
            handles += [
                module.register_forward_pre_hook(start(f"{name}_forward")),
                module.register_forward_hook(stop(f"{name}_forward")),
                module.register_full_backward_pre_hook(start(f"{name}_backward")),
                module.register_full_backward_hook(stop(f"{name}_backward")),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
