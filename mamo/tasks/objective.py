"""An objective as a sum of losses: each loss is an object, and stages compute once what the losses read.

A loss names the views that it reads: encodings and fused tokens of the student, and of the teacher. Stages give the
views, in a fixed order, each only where an active loss needs it.

Legend: B batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mamo.config.objective import BaseMaskingConfig
from mamo.config.values import Values
from mamo.data.collate import Batch
from mamo.distributed import all_reduce_sum
from mamo.tasks.base import BatchT, Task

Views = dict[str, Tensor]
"""Tensors [B, ...] by name."""
Compute = Callable[[Any, Any, Views, frozenset[str]], Views]
"""(network, batch, views so far, names wanted of those it gives) -> the views wanted."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass through a part of the network, which gives one or several views."""

    gives: tuple[str, ...]
    compute: Compute
    needs: tuple[str, ...] = ()
    """Views of earlier stages that it reads."""


Schedule = tuple[tuple[Stage, frozenset[str]], ...]
"""Stages in order, each with the views wanted of it."""


def schedule_stages(stages: Sequence[Stage], wanted: Iterable[str], given: Collection[str] = ()) -> Schedule:
    """Keep the stages that the wanted views need, in the order of `stages`; `given` views need none.

    Raises:
        ValueError: no stage gives a view.
    """
    needed, chosen = {*wanted}.difference(given), list[tuple[Stage, frozenset[str]]]()
    for stage in reversed(stages):
        found = needed & {*stage.gives}
        if found:
            chosen.append((stage, frozenset(found)))
            needed |= {*stage.needs}.difference(given)
    missing = needed - {name for stage in stages for name in stage.gives}
    if missing:
        known = sorted({name for stage in stages for name in stage.gives})
        raise ValueError(f"no stage gives the view {min(missing)!r} that a loss reads; there are {', '.join(known)}")
    return tuple(reversed(chosen))


def compute_views(network: nn.Module, batch: Batch, schedule: Schedule, given: Views | None = None) -> Views:
    """Run the stages of a schedule, and return what they give with the `given` views."""
    views: Views = {**(given or {})}
    for stage, wanted in schedule:
        views |= stage.compute(network, batch, views, wanted)
    return views


@dataclass(frozen=True, slots=True)
class Targets:
    """Teacher views and counts of one optimizer step; nothing carries a gradient."""

    views: Views
    """The teacher's, of this process's samples."""
    counts: dict[str, Tensor]
    """Terms of each loss in the global batch, int64 []."""
    fixed: Values
    """What each loss prepared once for the step."""


@dataclass(frozen=True, slots=True)
class Part(Generic[BatchT]):
    """One micro-batch: samples `start` to `start + len(batch)` of this process's batch."""

    batch: BatchT
    start: int
    views: Views
    """The student's."""
    targets: Views
    """The teacher's, of the same samples."""


LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
"""The share of the global loss, float [], and metrics by name."""


class Loss(ABC, Generic[BatchT]):
    """One term of an objective. It holds settings, no parameters: those are heads of the network.

    Attributes:
        name: of the term in metrics, weights and config.
        reads: student views.
        targets: teacher views; set in the constructor where a setting decides.
        unit: consecutive samples that must share a forward pass.
        unit_key: the config key that sets `unit`.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[BaseModel] | None] = None
    """Type of its own settings, in `losses.extra`."""
    reads: tuple[str, ...]
    targets: tuple[str, ...] = ()
    unit: int = 1
    unit_key: str = ""

    def __init__(self, config: Any, settings: Any = None) -> None:
        """Take what it needs from the run's config, and its own settings."""

    def heads(self, backbone: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
        """Build the heads that the loss adds to the network, by name."""
        return {}

    def stages(self) -> tuple[Stage, ...]:
        """Return passes of its own; they run after the encodings and before the masked passes."""
        return ()

    def check(self, world_size: int) -> None:
        """Raise ValueError where the loss does not work with so many processes."""

    def count(self, batch: BatchT) -> Tensor | int:
        """Count this process's terms of the sum; the default is one a sample."""
        return len(batch)

    def prepare(self, task: Any, views: Views, batch: BatchT, step: int) -> Any:
        """Compute, once a step and without gradient, what `__call__` gets as `fixed`.

        Args:
            task: has the queue of past samples.
            views: the teacher's, of this process's samples.
            batch: this process's samples.
            step: 0-based optimizer step.
        """
        return None

    @abstractmethod
    def __call__(self, network: Any, part: Part[BatchT], n_global: Tensor, fixed: Any) -> LossAndMetrics:
        """Compute the share of the global loss, float [], and of its metrics.

        Args:
            network: the student.
            part: one micro-batch with its views.
            n_global: terms of the loss in the global batch, int64 [].
            fixed: from `prepare`.
        """

    def after_step(self, task: Any, fixed: Any) -> None:
        """Update the state that belongs to the loss, once an optimizer step."""

    def trivial(self, tokenizer: PreTrainedTokenizerFast, batch: BatchT) -> float | None:
        """Return the loss of a predictor that ignores its input; None where it has no fixed value."""
        return None


class ObjectiveTask(Task[BatchT, Targets]):
    """A task whose objective is a weighted sum of `Loss` objects over views of one network."""

    active: tuple[Loss[BatchT], ...]
    """The losses whose weight is not 0, in the order of their passes."""
    schedule: Schedule
    """The student's stages."""
    shared: tuple[str, ...] = ()
    """Views of the student that the teacher gives, equal because they come from frozen parts."""

    def use_losses(self, active: Sequence[Loss[BatchT]], weights: dict[str, float], stages: Sequence[Stage]) -> None:
        """Take the losses and plan the student's stages.

        Args:
            active: in the order in which they are computed.
            weights: of each, by name, in the order in which they are logged.
            stages: all of the student's, in order.
        """
        self.active, self.weights = tuple(active), weights
        self.stages = tuple(stages)
        self.schedule = self.schedule_of(self.active)
        for loss in self.active:
            if loss.unit > self.unit:
                self.unit, self.unit_key = loss.unit, loss.unit_key

    def keep_losses(self, names: Iterable[str]) -> None:
        """Leave out all losses but these, for measurements."""
        kept = {*names}
        self.active = tuple(loss for loss in self.active if loss.name in kept)
        self.weights = {name: weight for name, weight in self.weights.items() if name in kept}
        self.schedule = self.schedule_of(self.active)

    def schedule_of(self, losses: Sequence[Loss[BatchT]]) -> Schedule:
        """Plan the student's stages for some of the losses."""
        return schedule_stages(self.stages, [name for loss in losses for name in loss.reads], self.shared)

    def count_terms(self, batch: BatchT) -> dict[str, Tensor]:
        """Count the terms of each loss over the global batch, int64 [], in one all-reduce; at least 1."""
        device = batch.image.device
        local = {loss.name: loss.count(batch) for loss in self.active}
        numbers = [n if isinstance(n, Tensor) else torch.full((), n, device=device) for n in local.values()]
        return dict(zip(local, all_reduce_sum(torch.stack([n.long() for n in numbers])).clamp(min=1)))

    def prepare_losses(self, views: Views, batch: BatchT, step: int) -> Targets:
        """Complete the teacher's views to the targets of a step."""
        counts = self.count_terms(batch)
        return Targets(views, counts, {loss.name: loss.prepare(self, views, batch, step) for loss in self.active})

    @torch.no_grad()
    def compute_targets(self, batch: BatchT, micro_batch_size: int, step: int) -> tuple[Targets, dict[str, Tensor]]:
        """See `Task`; without a teacher there are only counts."""
        return self.prepare_losses({}, batch, step), {}

    def losses(self, batch: BatchT, targets: Targets, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Task`."""
        rows = {name: value[start : start + len(batch)] for name, value in targets.views.items()}
        given = {name: rows[name] for name in self.shared}
        part = Part(batch, start, compute_views(self.network, batch, self.schedule, given), rows)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for loss in self.active:
            name = loss.name
            found = loss(self.network, part, targets.counts[name], targets.fixed[name])
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
                raise ValueError(f"loss {name}: {type(loss).__name__} must return (share of the loss, metrics by name)")
            losses[name] = found[0]
            metrics |= found[1]
        return losses, metrics

    def on_optimizer_step(self, batch: BatchT, targets: Targets, step: int) -> None:
        """See `Task`."""
        for loss in self.active:
            loss.after_step(self, targets.fixed[loss.name])

    def trivial_losses(self, batch: BatchT) -> dict[str, float]:
        """See `Task`."""
        found = {f"loss/{loss.name}": loss.trivial(self.tokenizer, batch) for loss in self.active}
        return {name: value for name, value in found.items() if value is not None}

    method: ClassVar[str]
    """Name of the method whose losses these are."""
    masking: BaseMaskingConfig
    """The masks of its views."""
    masking_mode: str

    def describe_method(self) -> str:
        """See `Task`: masking and losses."""
        masking, losses = self.masking, ", ".join(self.weights)
        ratios = f"{masking.image_ratio:.0%} of patches, {masking.text_ratio:.0%} of words"
        return f"{self.method}, {self.masking_mode} masking ({ratios}); losses {losses}"
