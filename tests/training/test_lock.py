"""The lock of a run's folder."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mamo
from mamo.config.schema import RunConfig
from mamo.trainer import train
from mamo.training import lock, run_dir
from mamo.training.lock import Holder, RunLock
from tests.tiny import TWO_STEPS

pytestmark = pytest.mark.usefixtures("no_curves")
ROOT = Path(__file__).parents[2]


def hold(folder: Path, number: int = 1, age_s: float = 0, **changed: Any) -> Path:
    """Write the lock of a process: of this one, except for what is changed."""
    path = folder / f".lock-{number}"
    path.write_text("")
    holder = replace(lock._this_process(path.stat().st_ino), **changed)
    path.write_text(json.dumps({name: getattr(holder, name) for name in Holder.__slots__}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def refusal(folder: Path) -> str:
    """Return the message with which a second process is refused."""
    with pytest.raises(ValueError) as caught, RunLock(folder):
        pass
    return str(caught.value)


def ended_process() -> int:
    """Return the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_second_start_is_refused_and_names_the_first(tmp_path: Path) -> None:
    """Bug: two runs write into one folder, and their metrics and weights mix."""
    with RunLock(tmp_path):
        message = refusal(tmp_path)
        assert f"{tmp_path} is in use by process {os.getpid()} on host {lock.socket.gethostname()}" in message
        assert f"process start time {lock._start_time(os.getpid())}, last heartbeat 0 s ago" in message
        assert "\n" not in message
        assert [path.name for path in tmp_path.iterdir()] == [".lock-1"]
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_starts_one_wins(tmp_path: Path) -> None:
    """Bug: two starts at the same moment both find the folder free, or both take over the lock of a dead process."""
    for first in ("none", "dead", "empty"):
        if first == "dead":
            hold(tmp_path, pid=ended_process())
        elif first == "empty":
            (tmp_path / ".lock-1").write_text("")
        taken: list[RunLock] = []
        begin = threading.Barrier(8)

        def start(begin: threading.Barrier = begin, taken: list[RunLock] = taken) -> None:
            begin.wait()
            with contextlib.suppress(ValueError):
                taken.append(RunLock(tmp_path).__enter__())

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1, first
        taken[0].__exit__(None, None, None)
        assert list(tmp_path.iterdir()) == [], first


@pytest.mark.parametrize("is_resume", [False, True])
def test_training_holds_the_lock_from_the_first_line_to_the_last(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, is_resume: bool
) -> None:
    """Bug: the folder is claimed when network and data are built, minutes after the start; a resume claims nothing."""
    config = tiny(training=TWO_STEPS, evaluation={"enabled": True})
    folder = Path(config.output_dir)
    if is_resume:
        mamo.train(tiny(training=TWO_STEPS))
    refused: list[str] = []

    def start_again(name: str) -> None:
        for again in (False, True):
            with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on host"):
                mamo.train(config, is_resume=again)
        refused.append(name)

    def spy(name: str, module: Any = mamo.trainer) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (start_again(name), real(*a, **k))[1])

    spy("resume_run" if is_resume else "new_run")
    spy("prepare_output_dir")
    monkeypatch.setattr(mamo.trainer, "train_and_evaluate", lambda *_: start_again("train"))
    monkeypatch.setattr(mamo.trainer, "write_run_report", lambda *_: start_again("report"))
    train(config, is_resume)
    assert refused == ["resume_run" if is_resume else "new_run", "prepare_output_dir", "train", "report"]
    assert list(folder.glob(".lock*")) == []


def test_a_refused_start_leaves_the_folder_as_it_was(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: a start in a used folder leaves its lock there, or a resume of nothing creates a folder."""
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="nothing to resume"):
        train(tiny(), is_resume=True)
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train(tiny(), is_resume=False)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "changed",
    [
        {"pid": "gone"},
        {"started": "12345"},  # another process has its number now
        {"inode": 1},  # the folder was copied
        {"host": "elsewhere", "age_s": lock.STALE_S + 5},
        {"machine": "an earlier boot", "age_s": lock.STALE_S + 5},
        {"pid": 10**30},
    ],
    ids=str,
)
def test_a_stale_lock_is_taken_over(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Bug: after `kill -9` or a power cut the run cannot be resumed, because its lock is left."""
    if changed.get("pid") == "gone":
        changed = {"pid": ended_process()}
    hold(tmp_path, **changed)
    with RunLock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock-2"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"pid": 1}', "null", "\0\0"])
def test_a_lock_without_content_is_of_a_killed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Bug: a kill between the creation of the lock and its content blocks the folder, or ends in a traceback."""
    monkeypatch.setattr(lock, "_UNWRITTEN_S", 0.05)
    (tmp_path / ".lock-1").write_text(text)
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"machine": "another container"}], ids=str)
def test_another_host_is_believed_while_its_heart_beats(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Bug: a process of another host counts as gone, since its number is unknown here; or a container of this one."""
    path = hold(tmp_path, age_s=20, pid=ended_process(), **changed)
    message = refusal(tmp_path)
    assert "last heartbeat 20 s ago" in message
    if "host" in changed:
        assert "or 60 s after the last heartbeat if it is dead" in message
    os.utime(path, (time.time() - 61,) * 2)
    with RunLock(tmp_path):
        pass


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    """Bug: a killed run whose parent has not asked for its exit code blocks the folder."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        started = lock._start_time(child.pid)
        deadline = time.monotonic() + 10
        while lock._start_time(child.pid) != "zombie" and time.monotonic() < deadline:
            time.sleep(0.01)
        hold(tmp_path, pid=child.pid, started=started)
        with RunLock(tmp_path):
            pass


def test_a_restart_by_torchrun_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torchrun starts rank 0 again on another host, and it waits a minute for the heartbeat of the dead one."""
    for name, value in (("TORCHELASTIC_RUN_ID", "j7"), ("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    hold(tmp_path, host="node2")
    message = refusal(tmp_path)  # of the same launch, not restarted: a mistake
    assert "on host node2" in message
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert "on host node2" in refusal(tmp_path)  # of another launch
    monkeypatch.setenv("MASTER_PORT", "29500")
    with RunLock(tmp_path):
        pass


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the lock is never renewed, so that another host takes over a run that goes on."""
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    with RunLock(tmp_path) as held:
        path = tmp_path / ".lock-1"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 10
        assert not held.is_lost


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_a_run_that_lost_its_lock_stops(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Bug: a suspended process wakes up, and writes beside the one that took its run over."""
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    write = run_dir.JsonlWriter.write
    config = tiny(training={"total_steps": 1000})

    def write_then_lose(self: run_dir.JsonlWriter, values: dict[str, Any]) -> None:
        write(self, values)
        if values["step"] == 2:
            if how == "removed":
                (self.path.parent / ".lock-1").unlink(missing_ok=True)
            else:
                shutil.copy(self.path.parent / ".lock-1", self.path.parent / ".lock-2")
        if values["step"] > 2:
            time.sleep(0.05)

    monkeypatch.setattr(run_dir.JsonlWriter, "write", write_then_lose)
    with pytest.raises(ValueError, match=r"the lock \.lock-1 of this run was removed, or another process took"):
        train(config, is_resume=False)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Bug: a resume in a read-only folder ends in a traceback, or trains until the first checkpoint."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"output_dir .*file cannot be written: Not a directory"),
        RunLock(tmp_path / "file"),
    ):
        pass


def test_probes_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Bug: a kill while the time is asked for leaves a hidden file for ever, or a probe in use is removed."""
    old, fresh = tmp_path / ".lock-now-old", tmp_path / ".lock-now-fresh"
    old.touch()
    fresh.touch()
    os.utime(old, (time.time() - 60,) * 2)
    with RunLock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-1", ".lock-now-fresh"]
        os.utime(fresh, (time.time() - 60,) * 2)
    assert not list(tmp_path.iterdir())
