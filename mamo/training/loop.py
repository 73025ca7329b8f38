"""The one training loop: every task runs in it.

State moves here and in the task's `on_optimizer_step`, nowhere else.
"""

import contextlib
import functools
import logging
import math
import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from mamo.config.schema import RunConfig
from mamo.data.collate import Batch
from mamo.data.images import BadSamplePolicy
from mamo.distributed import all_gather_object, all_reduce_sum, rank, sum_counts, world_size
from mamo.training import checkpoint
from mamo.training.async_writer import AsyncWriter
from mamo.training.checkpoint import CheckpointError
from mamo.training.failure import NonFiniteLoss, dump_failing_batch
from mamo.training.guard import Guard, HostCopy, PendingStep, held
from mamo.training.metric_logger import MetricLogger
from mamo.training.monitors import LossMonitor
from mamo.training.optim import learning_rate_at, set_learning_rate
from mamo.training.parallel import (
    DDP,
    SingleProcess,
    clip_gradients,
    local_batch_sizes,
    scale_gradients,
)
from mamo.training.preemption import SIGNALS, PreemptionHandler
from mamo.training.run_dir import Tracker

if TYPE_CHECKING:
    from mamo.tasks.base import Task  # below the tasks: for annotations

logger = logging.getLogger(__name__)


class Loop:
    """Runs optimizer steps `start_step` to `total_steps`; writes metrics and checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        task: "Task",
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        output_dir: Path,
        trackers: list[Tracker],
        checkpoint_state: Mapping[str, object],
        checkpoint_files: Mapping[str, Path],
        monitor: LossMonitor,
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
        self.monitor = monitor
        self.bad_samples = bad_samples
        _, self.micro_batch_size = local_batch_sizes(config.training, task.unit, task.unit_key)
        self.strategy = SingleProcess(config, task)
        self.guard = Guard(device, config.training.precision == "fp16")

    def join(self) -> None:
        """Share the steps with the other processes of the launch; the weights must be in their place by now."""
        if world_size() > 1 and self.config.training.parallel == "fsdp":
            from mamo.training.sharding import FSDP  # here: its libraries take a second to import

            self.strategy = FSDP(self.config, self.task, self.optimizer, self.device)
        elif world_size() > 1:
            self.strategy = DDP(self.config, self.task)

    def run(self, batches: Iterable[Batch], start_step: int, evaluate: "Evaluate | None") -> None:
        """Train. `batches` begins with the batch of step `start_step`.

        Raises:
            NonFiniteLoss: a loss or the gradient is not finite, in fp16 several gradients in a row; this step and a
                later one have moved nothing.
            Preempted: SIGTERM came; the step was finished and saved.
            KeyboardInterrupt: Ctrl-C came; the step was finished and saved, unless it came twice.
        """
        training, evaluation, batches = self.config.training, self.config.evaluation, iter(batches)
        log = None
        if rank() == 0:
            log = MetricLogger(self.output_dir, self.trackers, self.monitor, start_step, training.total_steps)
        self.task.network.train()
        done = saved = start_step
        pending: deque[tuple[PendingStep, dict[str, float]]] = deque()
        try:
            with PreemptionHandler(outlasts_error=world_size() > 1) as stop, AsyncWriter() as writing:
                mark = time.perf_counter()
                while (loaded := self._next(batches, stop)) is not None:
                    host_batch, counts = loaded
                    waited = time.perf_counter() - mark
                    issued = self.step(host_batch.to(self.device), done)
                    done += 1
                    for n_samples, skipped in counts:  # bad samples have one budget
                        self.bad_samples.record(n_samples, skipped)
                    saves = done % training.checkpoint_every_steps == 0 or done == training.total_steps
                    is_due = evaluation.every_steps > 0 and done % evaluation.every_steps == 0
                    kept = 0 if saves or is_due or self.guard.found_inf is None else 1
                    await_numbers([*(step for step, _ in pending), issued], kept)  # a part of this step's time
                    pending.append((issued, self._timing(len(host_batch), time.perf_counter() - mark, waited)))
                    self._log(pending, log, kept)
                    writing.check()
                    if saves:
                        saved = self._save_with_log(done, writing, log)
                    if evaluate is not None and is_due and done < training.total_steps:
                        if training.keep_best is not None:
                            writing.wait()  # the evaluation may choose this checkpoint
                        self._evaluate(evaluate, done, stop)
                    mark = time.perf_counter()
                self._log(pending, log)
                if stop.is_requested:
                    if saved < done:
                        self._save_with_log(done, writing, log)
                    writing.wait()
                    stop.leave(done)
        except BaseException as error:
            if world_size() == 1 and not isinstance(error, NonFiniteLoss):  # other processes may be elsewhere
                self._log(pending, log)
            raise
        finally:
            if log is not None:
                log.close()

    def step(self, batch: Batch, step: int) -> PendingStep:
        """Take one optimizer step on one batch; `read` returns its metrics.

        Raises:
            NonFiniteLoss: see `run`; on a GPU `read` raises it.
        """
        learning_rate = learning_rate_at(self.config.training, step)
        set_learning_rate(self.optimizer, learning_rate)
        targets, values = self.backward(batch, step)
        values["gradient_norm"] = clip_gradients(self.task.network, self.config.training.gradient_clip_norm or math.inf)
        numbers = HostCopy(self.guard.judge(torch.stack([value.detach().float() for value in values.values()])))
        settings = {f"weight/{name}": weight for name, weight in self.task.weights.items()}
        pending = PendingStep(step, batch, tuple(values), numbers, {**settings, "learning_rate": learning_rate})
        found_inf = self.guard.found_inf
        if found_inf is not None or "gradient_norm" in self.read(pending):
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
            with held(found_inf, self._followers):
                self.task.on_optimizer_step(batch, targets, step)
        self.optimizer.zero_grad(set_to_none=True)
        return pending

    @functools.cached_property
    def _followers(self) -> list[Tensor]:
        return self.task.followers()

    def read(self, pending: PendingStep) -> dict[str, float]:
        """Wait for a step's metrics and return them; without a gradient norm if the step was left out.

        Raises:
            NonFiniteLoss: the step ends the run.
        """
        *values, has_failed, scale, overflows = pending.numbers.tolist()
        metrics = dict(zip(pending.names, values))
        bad = [name for name, number in metrics.items() if not math.isfinite(number)]
        if has_failed:
            self._fail(bad, pending)
        if bad:
            del metrics["gradient_norm"]  # there is no number to log
        if self.guard.loss_scale is not None:
            metrics |= {"loss_scale": scale, "overflows": int(overflows)}
        return {**metrics, **pending.settings}

    def _fail(self, bad: list[str], pending: PendingStep) -> NoReturn:
        """Save what reproduces a step that is not finite, and end the run; nothing has moved since before that step."""
        step, batch, folder = pending.step, pending.batch, None
        with contextlib.suppress(CheckpointError):  # the disk may be full; raise NonFiniteLoss anyway
            folder = dump_failing_batch(self.output_dir, step, self.task.modules(), batch, self.checkpoint_files)
        sample_ids = [number for part in all_gather_object(batch.sample_id.tolist()) for number in part]
        raise NonFiniteLoss(bad, step + 1, sample_ids, folder)

    def _log(
        self, pending: deque[tuple[PendingStep, dict[str, float]]], log: MetricLogger | None, kept: int = 0
    ) -> None:
        """Read and log the issued steps, in order, but the last `kept`."""
        while len(pending) > kept:
            issued, timing = pending.popleft()
            values = self.read(issued)
            if log is not None:
                log.write(issued.step + 1, values, timing)

    def backward(self, batch: Batch, step: int) -> tuple[Any, dict[str, Tensor]]:
        """Compute the gradients of the weighted sum of losses over micro-batches and processes; move no state.

        Returns:
            The targets, and the losses and metrics of the global batch.

        Raises:
            AssertionError: the task's losses and weights have different names.
        """
        torch.manual_seed(_mix(self.config.seed, step))  # dropout, if any, is a function of (seed, step, process)
        sums: dict[str, Tensor] = {}
        scale = self.guard.loss_scale
        with self.strategy.precision_context():
            targets, metrics = self.strategy.compute_targets(batch, self.micro_batch_size, step)
            for start in range(0, len(batch), self.micro_batch_size):
                end = start + self.micro_batch_size
                with self.strategy.gradient_sync(enabled=end >= len(batch)):
                    losses, more = self.strategy.losses(batch.part(start, end), targets, start)
                    assert losses.keys() == self.task.weights.keys(), (losses.keys(), self.task.weights.keys())
                    loss = torch.stack([self.task.weights[name] * value for name, value in losses.items()]).sum()
                    loss = loss if scale is None else loss * scale.value
                    loss.backward()  # type: ignore[no-untyped-call]
                for name, value in {**{f"loss/{k}": v for k, v in losses.items()}, **more}.items():
                    sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        self.strategy.reduce_remaining_gradients()
        if scale is not None:
            scale_gradients(self.task.network, 1 / scale.value)
        summed = all_reduce_sum(torch.stack([value.float() for value in sums.values()]))
        return targets, {**dict(zip(sums, summed)), **metrics}

    def _save_with_log(self, step: int, writing: AsyncWriter, log: MetricLogger | None) -> int:
        """Sync the metrics to disk, then save; return `step`."""
        if log is not None:
            log.flush_to_disk()
        self.save(step, writing)
        return step

    def save(self, step: int, writing: AsyncWriter) -> None:
        """Copy the state after `step` and begin to write it, once the checkpoint before it is written."""
        state = {
            **self.checkpoint_state,
            "samples_seen": self.bad_samples.seen,
            "samples_skipped": self.bad_samples.skipped,
        }
        if self.guard.loss_scale is not None:
            state["loss_scale"] = self.guard.loss_scale.numbers()
        writing.wait()
        all_gather_object(
            None
        )  # the first process may wait for a slow disk longer than a step's operations wait for it
        tensors = checkpoint.snapshot(self.task.modules(), self.optimizer)
        if rank() == 0:
            kept = self.config.training.checkpoints_kept
            arguments = (self.output_dir, step, tensors, state, self.checkpoint_files, kept)
            writing.start(functools.partial(checkpoint.save, *arguments))

    def _next(
        self, batches: Iterator[Batch], stop: PreemptionHandler
    ) -> tuple[Batch, list[tuple[int, Sequence[str]]]] | None:
        """Return the next batch, and the samples and the skipped ones that the processes loaded.

        None at the end, or if any process got SIGTERM or Ctrl-C.
        """
        batch = stop.interruptible(lambda: next(batches, None))
        n_samples, skipped = (0, ()) if batch is None else (len(batch), batch.skipped)
        came = [int(stop.number == number) for number in SIGNALS]
        total, n_skipped, *came = sum_counts([n_samples, len(skipped), *came])
        stop.number = next((number for number, count in zip(SIGNALS, came) if count), None)
        if batch is None or stop.is_requested:
            return None
        return batch, all_gather_object((n_samples, skipped)) if n_skipped else [(total, ())]

    def _evaluate(self, evaluate: "Evaluate", step: int, stop: PreemptionHandler) -> None:
        """Evaluate after a step. A signal ends the evaluation; with several processes it ends the run."""
        if world_size() == 1:
            stop.interruptible(lambda: evaluate(step))
        else:
            with stop.suspended():
                evaluate(step)
        self.task.network.train()

    def _timing(self, samples: int, elapsed: float, waited: float) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {
            "samples_per_s": world_size() * samples / elapsed,
            "data_wait_share": waited / elapsed,
            "peak_memory_mib": peak,
        }


def await_numbers(issued: Sequence[PendingStep], kept: int) -> None:
    """Wait for the numbers of the issued steps, but the last `kept`."""
    for step in issued[: len(issued) - kept]:
        step.numbers.tolist()


class Evaluate(Protocol):
    """Evaluates the network after a step and records the result."""

    def __call__(self, step: int) -> None: ...


def _mix(seed: int, step: int) -> int:
    """Return one 63-bit number of seed, step and process, without collisions in any run's reach."""
    return (seed * 1_000_003 + step + (rank() << 44)) % 2**63
