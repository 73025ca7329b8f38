"""Measure the speedup of each shortcut: time of forward and backward pass with and without it, with equal results.

The slow variants are written here in the plain way, so that the network needs no switches for them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mamo.benchmark.cases import Case, build_case, synthetic_batch
from mamo.benchmark.step import losses_by_pass
from mamo.benchmark.timing import Rounds, seconds
from mamo.config.values import Values
from mamo.models.fusion import gather_tokens
from mamo.models.image_encoder import ImageEncoder
from mamo.models.towers import ImageTower
from mamo.tasks.objective import ObjectiveTask
from mamo.tasks.pretrain.batch import PairBatch
from mamo.trainer import TrainingRun
from mamo.training.loop import Loop
from mamo.training.precision import Precision

MIXED_WORDS = (16, 9, 8, 11)
"""Caption lengths in words, cyclic: similar to COCO's, whose mean is 10 or 11."""


def measure_shortcuts(case: Case, folder: Path, device: torch.device, precision: Precision) -> dict[str, float]:
    """Measure the speedup of each shortcut and the largest relative difference of the losses."""
    run, loop, _ = build_case(case, folder, device, precision)
    batch = synthetic_batch(run, case.batch_size, MIXED_WORDS).to(device)
    found: dict[str, float] = {}
    for name, (without, work) in shortcut_variants(run, loop, batch).items():
        rounds = Rounds()
        difference = _largest_difference(loop, batch, without, work)
        for number in range(case.rounds + 1):
            with_s = seconds(lambda: _plain(loop, batch), device)
            with without():
                without_s = seconds(work, device)
            if number > 0:
                rounds.add(speedup=without_s / with_s)
        found |= rounds.summary(f"shortcuts/{case.preset}/{name}")
        found[f"shortcuts/{case.preset}/{name}/loss_difference"] = difference
    return found


Without = tuple[Callable[[], AbstractContextManager[None]], Callable[[], dict[str, Tensor]]]


def shortcut_variants(run: TrainingRun, loop: Loop, batch: PairBatch) -> dict[str, Without]:
    """Return by shortcut: a context that disables it, and the forward and backward pass to run in that context."""
    backbone = run.task.network.backbone
    teacher: Any = run.task.modules()["teacher"]
    fusions = [backbone.fusion, teacher.module.fusion]

    def plain() -> dict[str, Tensor]:
        return _plain(loop, batch)

    return {
        "clean_encodings": (nullcontext, lambda: _separate_passes(loop, batch)),
        "last_layer_restriction": (lambda: _reading_late(fusions), plain),
        "visible_only": (lambda: _encoding_all(backbone.image_encoder), plain),
        "padding_removal": (nullcontext, lambda: _plain(loop, _padded(batch, run.config.data.text_max_tokens))),
    }


def _plain(loop: Loop, batch: PairBatch) -> dict[str, Tensor]:
    _, values = loop.backward(batch, 0)
    loop.task.network.zero_grad(set_to_none=True)
    return values


def _padded(batch: PairBatch, n_tokens: int) -> PairBatch:
    """Pad the captions to the token limit of the config instead of the longest caption of the batch."""
    missing = n_tokens - batch.input_ids.shape[1]
    names = ("input_ids", "masked_input_ids", "is_valid")  # padding is not valid, so its ids do not matter
    filled: Values = {name: functional.pad(getattr(batch, name), (0, missing)) for name in names}
    return replace(batch, **filled)


def _separate_passes(loop: Loop, batch: PairBatch) -> dict[str, Tensor]:
    """Let every pass encode its own inputs; the masked text pass also encodes the clean caption in its call."""
    task = loop.task
    assert isinstance(task, ObjectiveTask)
    before = task.weights, task.active, task.schedule
    weights = task.weights
    values: dict[str, Tensor] = {}
    with loop.strategy.precision_context():
        targets, _ = task.compute_targets(batch, len(batch), 0)
        for names in losses_by_pass(task).values():
            task.weights, task.active, task.schedule = before
            task.keep_losses(names)
            losses, _ = task.losses(batch, targets, 0)
            torch.stack([weights[name] * value for name, value in losses.items()]).sum().backward()  # type: ignore[no-untyped-call]
            values |= {f"loss/{name}": value.detach() for name, value in losses.items()}
    task.weights, task.active, task.schedule = before
    task.network.zero_grad(set_to_none=True)
    return values


@contextmanager
def _reading_late(fusions: list[Any]) -> Iterator[None]:
    """Compute every position in the last fusion layer and select the needed ones afterwards."""
    for fusion in fusions:
        last = fusion.layers[-1]

        def late(tokens: Tensor, is_valid: Tensor, at: Tensor | None = None, whole: Any = last.forward) -> Tensor:
            fused: Tensor = whole(tokens, is_valid)
            return fused if at is None else gather_tokens(fused, at)

        last.forward = late
    try:
        yield
    finally:
        for fusion in fusions:
            del fusion.layers[-1].forward


@contextmanager
def _encoding_all(encoder: ImageTower) -> Iterator[None]:
    """Encode all patches of the masked image, with masked patches hidden from attention."""
    assert isinstance(encoder, ImageEncoder)  # of the benchmark's config
    whole = encoder.encode

    def encode(embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        if visible is None:
            return whole(embedded)
        prefix = torch.arange(encoder.num_prefix_tokens, device=visible.device).expand(len(visible), -1)
        positions = torch.cat([prefix, visible + encoder.num_prefix_tokens], dim=1)
        is_seen = torch.zeros(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        is_seen = is_seen.scatter(1, positions, True)
        bias = torch.zeros(is_seen.shape, dtype=embedded.dtype, device=embedded.device)
        bias = bias.masked_fill(~is_seen, -torch.inf)[:, None, None]
        vit = encoder.vit
        hidden = vit.norm_pre(embedded)
        for block in vit.blocks:
            hidden = block(hidden, attn_mask=bias)
        return gather_tokens(vit.norm(hidden), positions)

    encoder.encode = encode  # type: ignore[method-assign]
    try:
        yield
    finally:
        del encoder.encode


def _largest_difference(
    loop: Loop,
    batch: PairBatch,
    without: Callable[[], AbstractContextManager[None]],
    work: Callable[[], dict[str, Tensor]],
) -> float:
    """Return the largest relative difference of a loss between the two variants."""
    ours = _plain(loop, batch)
    with without():
        theirs = work()
    names = [name for name in ours if name.startswith("loss/")]
    return max(float(abs(ours[name] - theirs[name]) / abs(ours[name]).clamp(min=1e-6)) for name in names)
