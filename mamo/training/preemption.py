"""End a process at a signal: finish the step, save, exit with 143, 129 or 130.

The signals are SIGTERM of a scheduler, SIGHUP of a terminal that is closed, and SIGINT of Ctrl-C. An inherited decision
to ignore the latter two, as under nohup, is kept.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

GRACE_S = 7.0
"""Time for a process to end by itself after SIGTERM, outside of a step; then it is ended."""
IMPATIENCE_S = 1.0
"""The same after a second Ctrl-C, wherever it is."""
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)
SIGNALS = (*_TERMINATING, signal.SIGINT)


class Preempted(SystemExit):
    """The process was asked to end, by SIGTERM unless `number` says otherwise; `str` is the line for the user."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)  # a shell's exit code for a process ended by the signal
        self.message, self.number = message, number

    def __str__(self) -> str:
        return self.message


class _Asked(BaseException):
    """A signal came within `interruptible`."""


def is_heeded(number: int) -> bool:
    """Return whether a signal ends this process: SIGTERM always, others unless it was started to ignore them."""
    return number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN


class PreemptionHandler:
    """Make SIGTERM, SIGHUP and a first Ctrl-C only set `number` within the block (main thread only).

    Within `interruptible` the signal ends what is done. A second Ctrl-C raises KeyboardInterrupt.

    With `outlasts_error`, SIGTERM and SIGHUP stay deferred after an error leaves the block. When one of several
    processes dies, torchrun sends SIGTERM to the others at once, and they must still report their own errors.
    """

    def __init__(self, outlasts_error: bool = False) -> None:
        self.number: int | None = None
        """The signal that came."""
        self._outlasts_error = outlasts_error
        self._is_waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if is_heeded(number):
                    self._before[number] = signal.signal(number, self._ask)
            _Watch.is_in_step = True
        return self

    @property
    def is_requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.is_requested:
            self.number = number
            if self._is_waiting:
                raise _Asked  # once: nothing interrupts what follows
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`; None as soon as a signal has come."""
        try:
            try:
                self._is_waiting, _Watch.is_in_step = True, False
                return None if self.is_requested else work()
            finally:
                self._is_waiting, _Watch.is_in_step = False, True
        except _Asked:
            self._is_waiting, _Watch.is_in_step = False, True
            return None

    def leave(self, step: int) -> None:
        """Raise what ends the run after `step` steps, which are saved."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt(
                f"step {step} is saved; continue with --resume" if step else "continue with --resume"
            )
        when = f"after step {step}, which is saved" if step else "before step 1"
        raise Preempted(f"terminated {when}; continue with --resume", self.number or signal.SIGTERM)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let a signal end the process at once within the block."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        _Watch.is_in_step = False
        before, self._before = self._before, {}
        for number, handler in before.items():
            if number == signal.SIGINT or kind is None or not self._outlasts_error:
                signal.signal(number, handler)


class _Watch:
    """The thread that ends a process which does not end by itself after SIGTERM or SIGHUP, or after a second Ctrl-C.

    Python handles a signal in the main thread, between two instructions: not while it waits in a library.
    """

    is_in_step = False
    """Whether a step is taken or saved, which is finished first."""

    def __init__(self) -> None:
        self.is_asked = False
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def end(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM or SIGHUP: end the process by an exception, once."""
        if not self.is_asked:
            self.is_asked = True
            raise Preempted("terminated", number)

    def _watch(self) -> None:
        interrupts = 0
        while number := os.read(self.reader, 1):
            interrupts += number[0] == signal.SIGINT
            if number[0] in _TERMINATING:
                self._wait_then_end(GRACE_S, number[0])
            elif interrupts > 1:
                self._wait_then_end(IMPATIENCE_S, signal.SIGINT)

    def _wait_then_end(self, grace_s: float, number: int) -> None:
        left_s, tick_s = grace_s, 0.1
        while left_s > 0:
            if self.ended.wait(tick_s):
                return
            is_finishing = self.is_in_step and number in _TERMINATING
            left_s = grace_s if is_finishing else left_s - tick_s
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(OSError):
            os.write(2, b"terminated: it did not end by itself\n")
        os._exit(128 + number)


@contextlib.contextmanager
def prompt_end() -> Iterator[None]:
    """End the process by `Preempted` at SIGTERM and SIGHUP within the block, and after `GRACE_S` in any case.

    A `PreemptionHandler` within defers it by the step that is taken.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch()
    handlers = {number: signal.signal(number, watch.end) for number in _TERMINATING if is_heeded(number)}
    descriptor = signal.set_wakeup_fd(watch.writer, warn_on_full_buffer=False)
    watch.thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        watch.ended.set()
        os.close(watch.writer)
        watch.thread.join()
        os.close(watch.reader)
