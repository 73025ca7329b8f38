"""Work beside the training: one piece at a time, in a thread."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

logger = logging.getLogger(__name__)


class AsyncWriter:
    """A thread for writing checkpoints. What it raises is raised by the next `start`, `check` or end of the block."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work` once the work before it is done."""
        self.wait()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise what the work raised, if it is done; never waits."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the work to be done; raise what it raised."""
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
            logger.warning("%s", error)  # beside the error that ends the run
        finally:
            self._thread.shutdown()
