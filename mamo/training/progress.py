"""Show the progress of a run: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """Losses, samples/s and the remaining time."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not self.is_terminal)
        self.started, self.start_step = time.monotonic(), start_step
        self.last_line = -PLAIN_LINE_EVERY_S

    def update(self, step: int, values: Mapping[str, float], samples_per_s: float) -> None:
        """Show one finished step."""
        losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if self.is_terminal:
            with contextlib.suppress(OSError):  # the terminal or the reader of a pipe is gone; the run goes on
                self.bar.set_postfix_str(f"{text} {samples_per_s:.0f} samples/s", refresh=False)
                self.bar.update()
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_LINE_EVERY_S or step == self.total_steps:
            self.last_line = now
            left_s = (now - self.started) / (step - self.start_step) * (self.total_steps - step)
            self.write(
                f"step {step}/{self.total_steps} {text} {samples_per_s:.0f} samples/s, {left_s / 60:.1f} min left"
            )

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        with contextlib.suppress(OSError):
            self.bar.write(line, file=sys.stderr) if self.is_terminal else print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar and restore the terminal."""
        with contextlib.suppress(OSError):
            self.bar.close()
