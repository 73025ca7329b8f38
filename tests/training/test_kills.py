"""A kill before any file operation, and a file cut at any byte: nothing is lost, and nothing half is read."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamo.config.schema import RunConfig
from mamo.tasks.registry import build_config
from mamo.trainer import train
from mamo.training import checkpoint, run_dir
from mamo.training.checkpoint import CheckpointError
from mamo.training.resume import resumed_config
from tests.training.test_checkpoint import states
from tests.training.test_resume import ends_of

pytestmark = pytest.mark.usefixtures("no_curves")

STEPS = {"total_steps": 3, "checkpoint_every_steps": 1, "checkpoints_kept": 2}
EVENTS = {
    "open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime", "shutil.copyfile", "shutil.rmtree",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def run_in_child(config: RunConfig, is_resume: bool, kill_at: int | None) -> int:
    """Train in a forked process, which is killed before its file operation `kill_at`; return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=_train, args=(config, is_resume, kill_at))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _train(config: RunConfig, is_resume: bool, kill_at: int | None) -> None:
    operations = itertools.count()

    def count() -> None:
        if next(operations) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event in EVENTS and (event != "open" or arguments[2] & WRITING)
        if is_write and str(arguments[0]).startswith(config.output_dir) and "tensorboard" not in str(arguments[0]):
            count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (count(), function(*arguments))[1]

    sys.addaudithook(on_event)
    os.fsync = counted(os.fsync)
    run_dir.JsonlWriter.write = counted(run_dir.JsonlWriter.write)  # type: ignore[method-assign]
    checkpoint.save_file = counted(checkpoint.save_file)
    train(config, is_resume)


def results_of(run: Path) -> list[tuple[int, object]]:
    """The evaluations of a run."""
    return [(entry["step"], entry["metrics"]) for entry in run_dir.read_evaluations(run)]


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the start", "the resume"])
def test_a_kill_before_any_file_operation_changes_nothing(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """Bug: between some two operations a kill leaves a run that neither starts nor resumes, or that ends otherwise."""
    monkeypatch.setattr("mamo.tasks.pretrain.task.PretrainTask.evaluate", lambda *_: {"itc/i2t_r1": 50.0})
    monkeypatch.setattr("mamo.trainer.write_run_report", lambda *_: None)
    monkeypatch.setattr("mamo.training.lock._UNWRITTEN_S", 0.05)

    def config_in(folder: Path) -> RunConfig:
        evaluation = {"enabled": True, "every_steps": 2}
        return tiny(output_dir=str(folder), training=STEPS, evaluation=evaluation)

    whole, run, begun = (tmp_path / name for name in ("whole", "run", "begun"))
    assert run_in_child(config_in(whole), False, None) == 0
    expected, results = ends_of(whole, 3), results_of(whole)
    assert len(results) == 2
    if killed == "the resume":
        monkeypatch.setattr("mamo.tasks.pretrain.task.PretrainTask.evaluate", lambda *_: os._exit(7))
        assert run_in_child(config_in(begun), False, None) == 7
        monkeypatch.setattr("mamo.tasks.pretrain.task.PretrainTask.evaluate", lambda *_: {"itc/i2t_r1": 50.0})
    for kill_at in itertools.count():
        shutil.rmtree(run, ignore_errors=True)
        if killed == "the resume":
            shutil.copytree(begun, run, symlinks=True)
        code = run_in_child(config_in(run), killed == "the resume", kill_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL, kill_at
        assert run_in_child(config_in(run), (run / run_dir.CONFIG).exists(), None) == 0, kill_at
        assert ends_of(run, 3) == expected, kill_at
        assert results_of(run) == results, kill_at
        assert [path.name for path in run.iterdir() if path.name.startswith(".lock")] == [], kill_at
        left = [path.name for path in (run / "checkpoints").iterdir()]
        assert sorted(left) == ["last", "step-0000002", "step-0000003"], kill_at
    assert kill_at > 100


def test_a_checkpoint_cut_at_any_byte_is_refused_or_passed_over(tmp_path: Path) -> None:
    """Bug: half a file is loaded, or a cut one ends in a traceback."""
    states(tmp_path, 4, 8)
    bad, good = (checkpoint.step_folder(tmp_path, step) for step in (8, 4))
    for file in sorted(path for path in bad.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for size in range(len(content)):
            file.write_bytes(content[:size])
            with pytest.raises(CheckpointError) as caught:
                checkpoint.resolve(tmp_path)
            message = str(caught.value)
            assert message.startswith(str(bad)), (file, size)
            assert f"checkpoint={good}" in message
            assert "\n" not in message
            if size % 50 == 0:
                assert checkpoint.last_good(tmp_path) == good
        file.write_bytes(content)
    assert checkpoint.resolve(tmp_path) == bad.resolve()


def test_metrics_cut_at_any_byte_lose_the_last_line_alone(tmp_path: Path) -> None:
    """Bug: a power cut in the last line loses more than that line, or stops the resume."""
    path = tmp_path / run_dir.METRICS
    lines = [json.dumps({"step": step, "loss": 0.1 * step, "é": 1}, ensure_ascii=False).encode() for step in (1, 2, 3)]
    content = b"\n".join(lines) + b"\n"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        run_dir.truncate_jsonl(path, 9)
        whole = [
            line for end, line in zip(itertools.accumulate(len(line) + 1 for line in lines), lines) if end - 1 <= size
        ]
        assert path.read_bytes() == b"".join(line + b"\n" for line in whole), size


def test_other_files_of_a_run_cut_at_any_byte_are_named(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    """Bug: a cut results.json or config.yaml ends in a traceback, or the run goes on with other settings."""
    run_dir.write_evaluations(tmp_path, [{"step": 3, "metrics": {"r": 50.0}}])
    results = tmp_path / run_dir.RESULTS
    content = results.read_bytes().rstrip()
    for size in range(len(content)):
        results.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"results\.json is not a valid results\.json"):
            run_dir.read_evaluations(tmp_path)
    config, file = tiny(training={"total_steps": 7}), tmp_path / run_dir.CONFIG
    run_dir.write_config(tmp_path, config)
    content = file.read_bytes()
    for size in range(0, len(content), 11):
        file.write_bytes(content[:size])
        try:
            found = resumed_config(config, file, build_config)
        except ValueError as error:
            message = str(error)
            is_named = str(file) in message or "--resume with another config than the run's" in message
        else:
            is_named = found == config
        assert is_named, size
