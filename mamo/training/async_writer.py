"""Write in a background thread, one piece of work at a time."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

logger = logging.getLogger(__name__)


class AsyncWriter:
    """A thread that writes checkpoints; the next `start`, `check` or end of the block re-raises its exceptions."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Start `work` after the previous work is done."""
        self.wait()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise the exception of finished work; never waits."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the work to finish; raise its exception."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # another error already ends the run
        finally:
            self._thread.shutdown()
