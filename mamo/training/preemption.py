"""Handle SIGTERM, which a scheduler sends to end a job: finish the step, save, exit with code 143."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Preempted(Exception):
    """The run was preempted; everything is saved."""

    EXIT_CODE = 128 + signal.SIGTERM  # a shell's exit code for a process ended by the signal


class PreemptionHandler:
    """Make SIGTERM only set `is_requested` within the block (main thread only, as others cannot handle signals).

    With `outlasts_error`, SIGTERM stays deferred after an error leaves the block. When one of several processes dies,
    torchrun sends SIGTERM to the others at once, and they must still report their own errors.
    """

    def __init__(self, outlasts_error: bool = False) -> None:
        self.is_requested = False
        self._outlasts_error = outlasts_error
        self._before: Any = None

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let SIGTERM end the process at once within the block: for work that a resume repeats (an evaluation)."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._before is not None and (kind is None or not self._outlasts_error):
            signal.signal(signal.SIGTERM, self._before)
