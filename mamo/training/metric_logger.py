"""Log the metrics of each step, on rank 0 only."""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from mamo.training.monitors import WINDOW_STEPS, LossMonitor
from mamo.training.progress import Progress
from mamo.training.run_dir import METRICS, TIMING, JsonlWriter, Tracker, log_to


class MetricLogger:
    """Write `metrics.jsonl` and `timing.jsonl`, call the trackers, show progress and warnings."""

    def __init__(
        self, output_dir: Path, trackers: list[Tracker], monitor: LossMonitor, start_step: int, total_steps: int
    ) -> None:
        self.trackers = trackers
        self.monitor = monitor
        self.metrics, self.timing = JsonlWriter(output_dir / METRICS), JsonlWriter(output_dir / TIMING)
        self.progress = Progress(start_step, total_steps)
        if start_step > 0:  # refill the monitor's window; its earlier warnings are not repeated
            with (output_dir / METRICS).open() as lines:
                for row in map(json.loads, deque(lines, WINDOW_STEPS)):
                    monitor.check(row["step"], row)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Log a finished step."""
        self.metrics.write({"step": step, **values})
        self.timing.write({"step": step, **timing})
        log_to(self.trackers, step, {**values, **timing})
        self.progress.update(step, values, timing["samples_per_s"])
        for line in self.monitor.check(step, values):
            self.progress.write(f"alarm: {line}")

    def flush_to_disk(self) -> None:
        """Sync the lines to disk, so that a checkpoint never exists without them, even after a power cut."""
        self.metrics.flush_to_disk()
        self.timing.flush_to_disk()

    def close(self) -> None:
        """Close the files and the progress bar."""
        self.progress.close()
        self.metrics.close()
        self.timing.close()
