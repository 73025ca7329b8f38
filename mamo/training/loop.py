"""The one training loop. Every task runs in it; state moves here and in the task's `after_step`, nowhere else."""

import logging
import math
import resource
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mamo.config import Config
from mamo.data.images import BadSamplePolicy
from mamo.training import checkpoint
from mamo.training.alarms import Alarms
from mamo.training.failure import NonFiniteLoss, write_reproduction
from mamo.training.optim import learning_rate_at
from mamo.training.precision import computing_in
from mamo.training.progress import Progress
from mamo.training.run_folder import METRICS, TIMING, LineLog, Tracker

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What the loop asks of a task."""

    weights: dict[str, float]

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """Everything that a checkpoint must hold, by name; `student` is the network."""
        ...

    def prepare(self, batch: Any, micro_batch_size: int, step: int) -> tuple[Any, dict[str, Tensor]]:
        """Targets for the losses, without gradient, and metrics."""
        ...

    def losses(self, batch: Any, targets: Any, start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted losses and metrics of one micro-batch, as shares of the global batch."""
        ...

    def after_step(self, batch: Any, targets: Any, step: int) -> None:
        """Move teacher, queue and the like."""
        ...


class Loop:
    """Runs optimizer steps `start_step` to `total_steps` and writes what a run leaves behind."""

    def __init__(
        self,
        config: Config,
        task: Task,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        output_dir: Path,
        trackers: list[Tracker],
        checkpoint_state: Mapping[str, Any],
        checkpoint_files: Mapping[str, Path],
        alarms: Alarms,
        bad_samples: BadSamplePolicy,
    ) -> None:
        self.config = config
        self.task = task
        self.optimizer = optimizer
        self.device = device
        self.output_dir = output_dir
        self.trackers = trackers
        self.checkpoint_state = dict(checkpoint_state)
        self.checkpoint_files = checkpoint_files
        self.alarms = alarms
        self.bad_samples = bad_samples
        self.micro_batch_size = config.training.micro_batch_size or config.training.batch_size_global

    def run(self, batches: Iterable[Any], start_step: int, evaluate: "Evaluate | None") -> None:
        """Train. `batches` begins with the batch of step `start_step`.

        Raises:
            NonFiniteLoss: a loss or the gradient is not finite; the optimizer has not moved.
        """
        training, evaluation = self.config.training, self.config.evaluation
        metrics_log, timing_log = LineLog(self.output_dir / METRICS), LineLog(self.output_dir / TIMING)
        progress = Progress(start_step, training.total_steps)
        self.task.network.train()
        mark = time.perf_counter()
        try:
            for step, host_batch in enumerate(batches, start=start_step):
                waited = time.perf_counter() - mark
                self.bad_samples.record(len(host_batch), host_batch.skipped)
                values = self.step(host_batch.to(self.device), step)
                done = step + 1
                metrics_log.write({"step": done, **values})
                elapsed = time.perf_counter() - mark
                timing = self._timing(len(host_batch), elapsed, waited)
                timing_log.write({"step": done, **timing})
                for tracker in self.trackers:
                    tracker.log(done, {**values, **timing})
                progress.update(done, values, timing["samples_per_s"])
                for line in self.alarms.check(done, values):
                    progress.say(f"alarm: {line}")
                if done % training.checkpoint_every_steps == 0 or done == training.total_steps:
                    metrics_log.flush_to_disk()
                    timing_log.flush_to_disk()
                    self.save(done)
                is_due = evaluation.every_steps > 0 and done % evaluation.every_steps == 0
                if evaluate is not None and is_due and done < training.total_steps:
                    evaluate(done)
                    self.task.network.train()
                mark = time.perf_counter()
        finally:
            progress.close()
            metrics_log.close()
            timing_log.close()

    def step(self, batch: Any, step: int) -> dict[str, float]:
        """One optimizer step on one batch; returns the step's metrics as plain numbers."""
        learning_rate = learning_rate_at(self.config.training, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        targets, values = self.backward(batch, step)
        parameters = [p for p in self.task.network.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.training.gradient_clip_norm)
        values["gradient_norm"] = norm
        numbers = dict(zip(values, torch.stack([v.detach().float() for v in values.values()]).tolist()))
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if bad:
            folder = write_reproduction(self.output_dir, step, self.task.modules(), batch, self.checkpoint_files)
            raise NonFiniteLoss(bad, step + 1, batch.sample_id.tolist(), folder)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(batch, targets, step)
        weights = {f"weight/{name}": weight for name, weight in self.task.weights.items()}
        return {**numbers, **weights, "learning_rate": learning_rate}

    def backward(self, batch: Any, step: int) -> tuple[Any, dict[str, Tensor]]:
        """Gradients of the weighted sum of losses, accumulated over micro-batches; moves no state.

        Raises:
            AssertionError: the task's losses and weights have different names.
        """
        torch.manual_seed(_mix(self.config.seed, step))  # dropout, if any, is a function of (seed, step)
        sums: dict[str, Tensor] = {}
        with self.computing():
            targets, metrics = self.task.prepare(batch, self.micro_batch_size, step)
            for start in range(0, len(batch), self.micro_batch_size):
                losses, more = self.task.losses(batch.part(start, start + self.micro_batch_size), targets, start)
                assert losses.keys() == self.task.weights.keys(), (losses.keys(), self.task.weights.keys())
                loss = torch.stack([self.task.weights[name] * value for name, value in losses.items()]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                for name, value in {**{f"loss/{k}": v for k, v in losses.items()}, **more}.items():
                    sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        return targets, {**sums, **metrics}

    def computing(self) -> AbstractContextManager[None]:
        """The precision of the run, for forward and backward passes."""
        precision = self.config.training.precision
        assert precision != "auto"
        return computing_in(precision, self.task.modules().values())

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`."""
        started = time.perf_counter()
        state = {
            **self.checkpoint_state,
            "samples_seen": self.bad_samples.seen,
            "samples_skipped": self.bad_samples.skipped,
        }
        checkpoint.save(
            self.output_dir,
            step,
            self.task.modules(),
            self.optimizer,
            state,
            self.checkpoint_files,
            self.config.training.checkpoints_kept,
        )
        logger.debug("checkpoint of step %d written in %.2f s", step, time.perf_counter() - started)

    def _timing(self, samples: int, elapsed: float, waited: float) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {"samples_per_s": samples / elapsed, "data_wait_share": waited / elapsed, "peak_memory_mib": peak}


class Evaluate(Protocol):
    """Evaluates the network after a step and records the result."""

    def __call__(self, step: int) -> None: ...


def _mix(seed: int, step: int) -> int:
    """One 63-bit number from two, without collisions in any run's reach."""
    return (seed * 1_000_003 + step) % 2**63
