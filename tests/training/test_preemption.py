"""SIGTERM and Ctrl-C, at any moment of a run."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mamo.trainer
from mamo.cli import main
from mamo.cli import run as run_script
from mamo.config.schema import RunConfig
from mamo.trainer import train
from mamo.training import checkpoint, run_dir
from mamo.training.preemption import GRACE_S, Preempted, PreemptionHandler
from tests.training.test_interruptions import at_step, bits

pytestmark = pytest.mark.usefixtures("no_curves")
ROOT = Path(__file__).parents[2]
SHORT = {"total_steps": 7, "checkpoint_every_steps": 5}


def send(number: int) -> None:
    """Send a signal to this process, and let Python handle it."""
    os.kill(os.getpid(), number)
    time.sleep(0)


def ends(work: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `work` as a command; return the exit code and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(work)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def pretrain_until(file: Path, number: signal.Signals) -> object:
    """Pre-train by the command up to step 3, in which the signal comes; return the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: send(number))
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", "--config", str(file)])
    return ended.value.code


def test_the_first_ctrl_c_saves(
    tiny: Callable[..., RunConfig], tiny_file: Callable[..., Path], tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    """Bug: Ctrl-C loses the steps since the last checkpoint, and `--resume` begins metrics.jsonl anew in silence."""
    file = tiny_file(training=SHORT)
    assert pretrain_until(file, signal.SIGINT) == 130
    assert "interrupted; step 3 is saved; continue with --resume\n" in capsys.readouterr().err
    run = tmp_path / "run"
    assert checkpoint.resolve(run).name == "step-0000003"
    assert len(run_dir.read_jsonl(run / "metrics.jsonl")) == 3
    caplog.set_level("INFO")
    main(["pretrain", "--config", str(file), "--resume"])
    assert "resuming after step 3 from" in caplog.text
    whole = tiny(training=SHORT, output_dir=str(tmp_path / "whole"))
    train(whole, is_resume=False)
    assert bits(run, 7) == bits(tmp_path / "whole", 7)


def test_the_second_ctrl_c_leaves_at_once(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Bug: a step that takes minutes cannot be ended by Ctrl-C."""

    def interrupt(*_: object) -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)
        raise AssertionError("the second Ctrl-C did not leave")

    monkeypatch.setattr("mamo.training.loop.Loop.step", interrupt)
    code, _ = ends(lambda: train(tiny(training=SHORT), is_resume=False), capsys)
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 5, 7])
def test_any_step_is_saved_once(tiny: Callable[..., RunConfig], capsys: Any, number: int, code: int, step: int) -> None:
    """Bug: a signal in the last step, or in one that is saved anyway, is lost or saves twice."""
    config = tiny(training=SHORT)
    saved: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: send(number))
        real = checkpoint.save
        patch.setattr(checkpoint, "save", lambda *a: (saved.append(a[1]), real(*a))[1])
        assert ends(lambda: train(config, is_resume=False), capsys)[0] == code
    assert saved == sorted({n for n in (5, 10) if n <= step} | {step})
    assert checkpoint.resolve(Path(config.output_dir)).name == f"step-{step:07d}"


@pytest.mark.parametrize("at", [0, 3])
def test_waiting_for_a_batch_is_ended(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any, at: int
) -> None:
    """Bug: SIGTERM waits for the next batch, which a slow disk or the start of the loader delays by minutes."""
    config = tiny(training=SHORT)
    batches = mamo.trainer.TrainingRun.batches

    def slow(self: mamo.trainer.TrainingRun, *arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(self, *arguments)):
            if number == at:
                threading.Timer(0.1, send, [signal.SIGTERM]).start()
                time.sleep(60)
            yield batch

    monkeypatch.setattr(mamo.trainer.TrainingRun, "batches", slow)
    begun = time.monotonic()
    code, message = ends(lambda: train(config, is_resume=False), capsys)
    assert code == 143
    assert time.monotonic() - begun < 10
    when = f"terminated after step {at}, which is saved" if at else "terminated before step 1"
    assert f"{when}; continue with --resume\n" in message
    run = Path(config.output_dir)
    assert [folder.name for folder in checkpoint.step_folders(run)] == ([f"step-{at:07d}"] if at else [])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_evaluation_is_ended_and_its_step_saved(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int, code: int
) -> None:
    """Bug: a signal in an evaluation between two checkpoints loses the steps before it."""
    config = tiny(training=SHORT, evaluation={"enabled": True, "every_steps": 3})

    def evaluate(*_: object) -> dict[str, float]:
        send(number)
        raise AssertionError("the evaluation goes on")

    monkeypatch.setattr("mamo.tasks.pretrain.task.PretrainTask.evaluate", evaluate)
    assert ends(lambda: train(config, is_resume=False), capsys)[0] == code
    assert checkpoint.resolve(Path(config.output_dir)).name == "step-0000003"


@pytest.mark.parametrize("place", ["new_run", "prepare_output_dir", "write_run_report"])
def test_sigterm_outside_of_the_steps_ends_with_143(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, place: str
) -> None:
    """Bug: SIGTERM before the first step or after the last ends by the signal itself, or in a traceback."""
    monkeypatch.setattr(mamo.trainer, place, lambda *_: send(signal.SIGTERM))
    file = tiny_file(training={"total_steps": 1, "warmup_steps": 0}, evaluation={"enabled": True})
    monkeypatch.setattr("mamo.tasks.pretrain.task.PretrainTask.evaluate", lambda *_: {"r": 1.0})
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--config", str(file)])
    assert ended.value.code == 143
    assert capsys.readouterr().err.endswith("terminated; continue with --resume\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert list((file.parent / "run").glob(".lock*")) == []


def test_a_write_that_fails_is_not_reported_as_saved(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Bug: SIGTERM on a full disk says that the step is saved."""

    def full(*_: object) -> None:
        raise checkpoint.CheckpointError("disk full")

    at_step(monkeypatch, 2, lambda: send(signal.SIGTERM))
    monkeypatch.setattr(checkpoint, "save", full)
    code, message = ends(lambda: train(tiny(training=SHORT), is_resume=False), capsys)
    assert code == 2
    assert "error: disk full" in message


def test_an_ignored_interrupt_stays_ignored() -> None:
    """Bug: Ctrl-C reaches a run that was started in the background of a script, where the shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionHandler() as stop:
            send(signal.SIGINT)
            assert not stop.is_requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_command_an_uncaught_end_is_143() -> None:
    """Bug: `mamo.train` in a program of one's own ends in a traceback with exit code 1."""
    assert Preempted("terminated").code == 143
    assert isinstance(Preempted("terminated"), SystemExit)


STUCK = """
import signal, sys, time
from mamo.cli import run
from mamo.training import preemption
from mamo.training.preemption import PreemptionHandler
preemption.GRACE_S = 0.3
def stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])  # as in a library: Python cannot act
    if sys.argv[1] == "step":
        with PreemptionHandler():
            print("begun", flush=True)
            time.sleep(1.5)
            print("step done", flush=True)
    else:
        print("begun", flush=True)
    time.sleep(60)
run(stuck)
"""


@pytest.mark.parametrize("where", ["step", "elsewhere"])
def test_a_process_that_is_stuck_in_a_library_is_ended(where: str) -> None:
    """Bug: SIGTERM, and a second one, does nothing while Python waits in a pipe or a collective; only SIGKILL does."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)  # until it waits: before, Python itself would act
    process.terminate()
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 143, errors
    assert output == ("step done\n" if where == "step" else "")
    assert errors == "terminated: it did not end by itself\n"


def start(file: Path, *overrides: str) -> "subprocess.Popen[str]":
    """Start a pre-training in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mamo", "pretrain", "--config", str(file), *overrides],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def end(process: "subprocess.Popen[str]", number: int) -> tuple[float, str]:
    """Send a signal to the process group; return the seconds until it ended, and stderr."""
    begun = time.monotonic()
    os.killpg(process.pid, number)
    try:
        errors = process.communicate(timeout=30)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return time.monotonic() - begun, errors


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_group_while_the_loader_starts(tiny_file: Callable[..., Path], number: int, code: int) -> None:
    """Bug: the signal ends the loader's half-started processes, and the main one writes into their pipe for ever."""
    file = tiny_file(data={"workers": 4, "train_scenes": 20_000}, training={"total_steps": 100_000})
    process = start(file)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("parameters: "):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3:  # the resource tracker and two workers
        time.sleep(0.005)
    seconds, errors = end(process, number)
    assert process.returncode == code, errors
    assert seconds < 10
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_at_any_moment(tiny_file: Callable[..., Path], number: int) -> None:
    """Bug: at some moment between the first line and the last the run hangs, or ends with another code."""
    for moment in range(24):
        output_dir = str(tiny_file().parent / f"run-{moment}")
        file = tiny_file(
            output_dir=output_dir,
            data={"workers": 2},
            training={"total_steps": 100_000},
            evaluation={"enabled": True, "every_steps": 40},
        )
        process = start(file)
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(moment * 0.7)
        seconds, errors = end(process, number)
        # Python ends itself by SIGINT where Ctrl-C came within an `exec` of an import; a shell shows 130 for both
        codes = (128 + number, -number) if number == signal.SIGINT else (128 + number,)
        assert process.returncode in codes, (moment, errors)
        assert seconds < 10, moment
        assert "Traceback" not in errors, (moment, errors)


def test_the_grace_is_short_enough() -> None:
    """Bug: a scheduler's ten seconds are over before the process ends itself."""
    assert GRACE_S < 8


def test_a_closed_terminal_saves(tiny_file: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Bug: closing the terminal sends SIGHUP, which ends the run at once and loses the steps since the checkpoint."""
    assert pretrain_until(tiny_file(training=SHORT), signal.SIGHUP) == 129
    assert "terminated after step 3, which is saved; continue with --resume\n" in capsys.readouterr().err
    assert checkpoint.resolve(tmp_path / "run").name == "step-0000003"


def test_nohup_outlives_its_terminal(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: SIGHUP ends a run that was started under nohup, or one outside of training ends without its exit code."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda: send(signal.SIGHUP))
        run_script(lambda: train(tiny(training=SHORT), is_resume=False))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: send(signal.SIGHUP))
    assert ended.value.code == 129
