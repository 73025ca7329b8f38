"""SIGTERM, with which a scheduler ends a job: finish the step, save, leave with exit code 143."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Preempted(Exception):
    """The run was asked to end, and everything is saved."""

    EXIT_CODE = 128 + signal.SIGTERM  # as a shell reports a process that the signal ended


class PreemptionHandler:
    """Within the block SIGTERM only sets `is_requested` (in the main thread, which alone may handle signals).

    After an error that leaves the block too, if `outlasts_error`: when one of several processes dies, torchrun sends
    SIGTERM to the others at once, which must still tell what they saw.
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
        """SIGTERM ends the process at once: for work that is done again after a resume, such as an evaluation."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._before is not None and (kind is None or not self._outlasts_error):
            signal.signal(signal.SIGTERM, self._before)
