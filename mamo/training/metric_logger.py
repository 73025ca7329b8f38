"""What is written down of each step, by the first process alone."""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from mamo.training.monitors import WINDOW_STEPS, LossMonitor
from mamo.training.progress import Progress
from mamo.training.run_dir import METRICS, TIMING, JsonlWriter, Tracker


class MetricLogger:
    """`metrics.jsonl`, `timing.jsonl`, trackers, progress and alarms."""

    def __init__(
        self, output_dir: Path, trackers: list[Tracker], alarms: LossMonitor, start_step: int, total_steps: int
    ) -> None:
        self.trackers = trackers
        self.alarms = alarms
        self.metrics, self.timing = JsonlWriter(output_dir / METRICS), JsonlWriter(output_dir / TIMING)
        self.progress = Progress(start_step, total_steps)
        if start_step > 0:  # what the alarms had seen; what they said then is not said again
            with (output_dir / METRICS).open() as lines:
                for row in map(json.loads, deque(lines, WINDOW_STEPS)):
                    alarms.check(row["step"], row)

    def write(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Record a finished step."""
        self.metrics.write({"step": step, **values})
        self.timing.write({"step": step, **timing})
        for tracker in self.trackers:
            tracker.log(step, {**values, **timing})
        self.progress.update(step, values, timing["samples_per_s"])
        for line in self.alarms.check(step, values):
            self.progress.say(f"alarm: {line}")

    def flush_to_disk(self) -> None:
        """Put the lines on the disk, so that no power cut leaves a checkpoint without them."""
        self.metrics.flush_to_disk()
        self.timing.flush_to_disk()

    def close(self) -> None:
        """Release the files and the terminal."""
        self.progress.close()
        self.metrics.close()
        self.timing.close()
