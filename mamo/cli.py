"""The `mamo` command, and the one way out of every command: an exit code and one line on stderr.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | `data check`, `data audit` (by id), `data build`: a gap; `compare`: outside the band |
| 2 | a mistake in the arguments, the config or the data; a file that cannot be read or written |
| 129 | the terminal was closed (SIGHUP); in training after the step was saved |
| 130 | interrupted (Ctrl-C); in training after the step was saved, at a second Ctrl-C at once |
| 141 | the reader of the output closed the pipe |
| 143 | terminated (SIGTERM); in training after the step was saved |
"""

import argparse
import codecs
import contextlib
import ctypes
import difflib
import importlib
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol, cast

from mamo.commands.shared import is_first_rank
from mamo.training.preemption import Preempted, prompt_end

COMMANDS = (
    "pretrain", "finetune", "evaluate", "data", "card", "compare", "plot", "demo", "embed", "export", "probe",
    "pipeline", "study", "aggregate-folds", "benchmark", "keys",
)  # fmt: skip
"""Each is a module of `mamo.commands` with `main(argv, prog) -> exit code or None`."""
MISTAKE = 2
MOST_LINES, MOST_COLUMNS = 100, 2000
"""Of a message: a name or value of a hostile file may have megabytes."""
SPIN_COUNT = "10000"
"""Rounds of a loop in which an idle OpenMP thread waits before it sleeps. PyTorch's default is without end: next to one
other busy program the training steps then take many times as long."""
MALLOC_OPTIONS = ((-3, 2**30), (-1, 2**31 - 1))
"""glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes."""
INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + signal.SIGPIPE


class Command(Protocol):
    """Interface of a module of `mamo.commands`."""

    def main(self, argv: Sequence[str] | None, prog: str | None) -> int | None:
        """Read the arguments and run the command; return its exit code."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mamo COMMAND ...`; `argv` defaults to the command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        run_command(words[0], words[1:], f"mamo {words[0]}")
    else:
        run(lambda: _list_commands(words))


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run one command through `run`.

    Args:
        name: one of `COMMANDS`.
        argv: its arguments; defaults to the command line.
        prog: name of the program in its help; defaults to the script's.
    """
    run(lambda: _module(name).main(argv, prog))


def run(main: Callable[[], int | None]) -> None:
    """Call `main`; exit with its code unless that is 0 or None, or with the code and line of the error that ended it.

    Only rank 0 logs at level INFO. Set the environment variable `MAMO_TRACEBACK=1` to see the traceback of a mistake.
    """
    _limit_spinning()
    _keep_freed_memory()
    _print_any_text()
    level = logging.INFO if is_first_rank() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    with prompt_end():
        code, message = _outcome(main)
        if message:
            with contextlib.suppress(OSError):
                print(message, file=sys.stderr, flush=True)
        _discard_unwritable_output()
    if code:
        sys.exit(code)


def _limit_spinning() -> None:
    """Make idle OpenMP threads sleep, unless the user chose otherwise; OpenMP reads this when PyTorch is imported."""
    if not any(name.startswith(("GOMP_", "KMP_")) or name == "OMP_WAIT_POLICY" for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors, unless the user chose otherwise.

    It returns large blocks at once, and each step has the system clear the same pages again.
    """
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if sys.platform == "linux" and not any(name.startswith(chosen) for name in os.environ):
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in MALLOC_OPTIONS:
                mallopt(option, value)


def _outcome(main: Callable[[], int | None]) -> tuple[int, str]:
    """Call `main`; return the exit code and the line for stderr."""
    try:
        return _call(main), ""
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            return CLOSED_PIPE, ""
        if os.environ.get("MAMO_TRACEBACK"):
            raise
        return MISTAKE, f"error: {_message(error)}"
    except Preempted as end:
        return cast(int, end.code), str(end)
    except KeyboardInterrupt as end:
        return INTERRUPTED, "; ".join(["interrupted", *map(str, end.args)])


def _call(main: Callable[[], int | None]) -> int:
    """Call `main` and flush standard output; return the exit code."""
    try:
        code = main()
    except Preempted:
        raise
    except SystemExit as end:  # raised by argparse, and by the ranks that leave the message to another one
        if isinstance(end.code, str):
            raise
        code = end.code
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None
    return code or 0


def _message(error: ValueError | OSError) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = text.split("\n")
    more = [f"and {len(lines) - MOST_LINES:,} more lines"] if len(lines) > MOST_LINES else []
    shown = [line if len(line) <= MOST_COLUMNS else f"{line[:MOST_COLUMNS]}..." for line in lines[:MOST_LINES]]
    return "\n".join([*shown, *more])


def _print_any_text() -> None:
    """Let standard output and error print every character: an ASCII locale becomes UTF-8, others escape theirs."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if is_ascii else stream.encoding, errors="backslashreplace")


def _has_lost_reader() -> bool:
    """Return whether standard output or standard error is a pipe that nobody reads."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # errors and hang-ups are always reported
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard_unwritable_output() -> None:
    """Redirect standard output to /dev/null where it cannot be flushed: the interpreter flushes it again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list_commands(words: Sequence[str]) -> None:
    """Print the help or the version; exit with an error where the command is missing or unknown."""
    summaries = [(name, (_module(name).__doc__ or "").splitlines()[0].split(": `")[0]) for name in COMMANDS]
    commands = "\n".join(f"  {name:16} {summary.rstrip('.')}" for name, summary in summaries)
    parser = argparse.ArgumentParser(
        "mamo",
        usage="mamo COMMAND ...",
        description="Pre-train, fine-tune and evaluate vision-language models.",
        epilog=f"commands (mamo COMMAND --help lists the arguments of one):\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mamo {version('mamo')}")
    _, unknown = parser.parse_known_args(words)
    name = next((word for word in unknown if not word.startswith("-")), None)
    if name is None:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    parser.error(f"unknown command {name!r}; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"))


def _module(name: str) -> Command:
    """Import the module of a command; none of them imports torch."""
    return cast(Command, importlib.import_module(f"mamo.commands.{name.replace('-', '_')}"))
