"""Hold the folder of a run: two processes never write into one `output_dir`.

The lock is a file `.lock-N` of the folder, created with O_EXCL, so that it works on file systems without `flock`. It
holds the host, the process and the process's start time; its modification time is the heartbeat. The lock is stale
where the process is gone (on this host), or where no heartbeat came for `STALE_S` (elsewhere). A stale lock N is taken
over by creating the file N + 1, which only one process can do.
"""

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

HEARTBEAT_S = 10.0
STALE_S = 60.0
_UNWRITTEN_S = 1.0
"""After this time a lock without content is one whose process was killed while it made it."""
_NAME = re.compile(r"\.lock-(\d+)")
_PROBE = ".lock-now-"
"""Prefix of the files whose time is the present one, by the clock of the file system."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str
    """Boot and process namespace, in which `pid` has its meaning."""
    pid: int
    started: str
    """Start time of the process in clock ticks since boot; empty where the system does not give it."""
    since: str
    """Time at which it took the lock."""
    inode: int
    """Of the lock file: that of a copied folder has another one."""
    launch: str = ""
    """Launch by torchrun with several hosts; empty without."""
    restart: int = 0
    """Restarts of that launch so far."""


class RunLock:
    """Hold the lock of a run's folder within the block.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.is_lost = False
        self._path = output_dir
        self._holder: Holder | None = None
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            while self._holder is None:
                self._try_to_take()
        except OSError as error:
            raise ValueError(f"output_dir {self.output_dir} cannot be written: {error.strerror}") from None
        self._heartbeat.start()
        return self

    def guard(self, values: Iterator[T]) -> Iterator[T]:
        """Yield the values as long as this process holds the lock.

        Raises:
            ValueError: another process took it over, as this one showed no heartbeat for `STALE_S`; or it was removed.
        """
        for value in values:
            if self.is_lost:
                raise ValueError(
                    f"output_dir {self.output_dir}: the lock {self._path.name} of this run was removed, or another "
                    "process took the run over while this one was suspended; this one ends without writing"
                )
            yield value

    def _try_to_take(self) -> None:
        """Create the lock file; return without it where another process was quicker."""
        locks = _lock_files(self.output_dir)
        for path in locks.values():
            self._refuse_if_held(path)
        path = self.output_dir / f".lock-{max(locks, default=0) + 1}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return
        holder = _this_process(os.fstat(descriptor).st_ino)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(holder)))
        try:
            for other in _lock_files(self.output_dir).values():  # of a process that began meanwhile
                if other != path:
                    self._refuse_if_held(other)
            if _read(path) != holder:  # written too late: another process took the empty file for a dead one's
                return
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        for other in (*locks.values(), *_old_probes(path)):
            other.unlink(missing_ok=True)
        self._path, self._holder = path, holder

    def _refuse_if_held(self, path: Path) -> None:
        try:
            holder, age_s = _read(path), _age_s(path)
        except FileNotFoundError:
            return  # given back meanwhile
        if holder is None or _is_stale(holder, path, age_s):
            return
        here = holder.host == socket.gethostname()
        advice = "" if here else f", or {STALE_S:.0f} s after the last heartbeat if it is dead"
        raise ValueError(
            f"output_dir {self.output_dir} is in use by process {holder.pid} on host {holder.host}, which took it at "
            f"{holder.since} (process start time {holder.started or 'unknown'}, last heartbeat {max(age_s, 0):.0f} s "
            f"ago, lock file {path.name}): wait until it ends{advice}, or choose another output_dir"
        )

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self.is_lost = _read(self._path) != self._holder or max(_lock_files(self.output_dir)) > self._number
                os.utime(self._path)
            except FileNotFoundError:
                self.is_lost = True
            except OSError:  # a network file system that does not answer for a time
                continue
            if self.is_lost:
                return

    @property
    def _number(self) -> int:
        return int(self._path.name.rpartition("-")[2])

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._ended.set()
        self._heartbeat.join()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._holder:
                os.utime(self._path)
                for probe in _old_probes(self._path):
                    probe.unlink(missing_ok=True)
                self._path.unlink()


def _lock_files(folder: Path) -> dict[int, Path]:
    """Return the lock files by number, in order."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return {int(match[1]): path for match, path in sorted(found, key=lambda item: int(item[0][1]))}


def _read(path: Path) -> Holder | None:
    """Return the holder; None if the file has no valid content, even after the time that writing it takes."""
    deadline = time.monotonic() + _UNWRITTEN_S
    while True:
        try:
            holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
            if all(isinstance(getattr(holder, field.name), field.type) for field in fields(Holder)):  # type: ignore[arg-type]
                return holder
        except (ValueError, TypeError):
            pass
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _age_s(path: Path) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file system: those of hosts differ."""
    modified = path.stat().st_mtime
    with tempfile.NamedTemporaryFile(prefix=_PROBE, dir=path.parent) as probe:
        return os.fstat(probe.fileno()).st_mtime - modified


def _old_probes(lock: Path) -> list[Path]:
    """List the probes of `_age_s` that killed processes left before the last heartbeat of `lock`."""
    now_s, found = lock.stat().st_mtime, []
    for probe in lock.parent.glob(f"{_PROBE}*"):
        with contextlib.suppress(FileNotFoundError):  # in use until now
            if now_s - probe.stat().st_mtime > _UNWRITTEN_S:
                found.append(probe)
    return found


def _this_process(inode: int) -> Holder:
    address = os.environ.get("MASTER_ADDR", "")
    is_shared = address not in ("", "localhost", "127.0.0.1", "::1")  # else its processes are all on this host
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        inode=inode,
        launch=" ".join(os.environ.get(name, "") for name in names) if is_shared else "",
        restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _is_stale(holder: Holder, path: Path, age_s: float) -> bool:
    """Say whether the holder is gone, or was stopped by torchrun before it started this process again."""
    own = _this_process(0)
    if own.launch and own.launch == holder.launch and own.restart > holder.restart:
        return True
    if (own.host, own.machine) != (holder.host, holder.machine):
        return age_s > STALE_S
    if path.stat().st_ino != holder.inode:  # of a copied folder
        return True
    return not _is_running(holder.pid, holder.started)


def _is_running(pid: int, started: str) -> bool:
    try:
        os.kill(max(pid, 1), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    found = _start_time(pid)
    return not (found and started and found != started)  # else another process has its number now


def _start_time(pid: int) -> str:
    """Return the start time in clock ticks since boot; "zombie" for one that ended; "" where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "zombie" if fields[0] in ("Z", "X") else fields[19]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
