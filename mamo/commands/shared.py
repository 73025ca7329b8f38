"""Context managers that several commands share."""

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator

from mamo.training.preemption import Preempted


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of those that `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


logger = logging.getLogger(__name__)


def announce(work: str, of: object) -> None:
    """Log what begins: the imports that follow take seconds."""
    logger.info("%s: %s", work, of)


def positive(text: str) -> int:
    """Return a whole number of at least 1, as the `type` of an argument. Raises ArgumentTypeError."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text[:40]!r}")
    return number


@contextlib.contextmanager
def errors_on_rank_0() -> Iterator[None]:
    """Report a mistake on rank 0 only; the other ranks exit with code 2 in silence.

    Use it around work in which every rank finds the same mistake, such as reading a config.
    """
    try:
        yield
    except (ValueError, OSError):
        if is_first_rank() or os.environ.get("MAMO_TRACEBACK"):
            raise
        raise SystemExit(2) from None


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Add the way to continue to the message of an interrupted training run."""
    try:
        yield
    except KeyboardInterrupt as end:
        raise KeyboardInterrupt(*(end.args or ["continue with --resume"])) from None
    except Preempted as end:
        raise Preempted(str(end) if "--resume" in str(end) else f"{end}; continue with --resume", end.number) from None
