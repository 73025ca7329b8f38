"""What ends a run from outside: SIGTERM, a dead process, a dead loader, a slow or full disk."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest

from mamo.cli import run as run_script
from mamo.config.schema import RunConfig
from mamo.trainer import train
from mamo.training import checkpoint, run_dir
from mamo.training.async_writer import AsyncWriter

pytestmark = pytest.mark.usefixtures("no_curves")

ROOT = Path(__file__).parents[2]
STATE = ("student", "teacher", "queue", "optimizer")


def bits(run: Path, step: int) -> list[bytes]:
    """Everything that a resume must not change."""
    folder = checkpoint.step_folder(run, step)
    return [*((folder / f"{name}.safetensors").read_bytes() for name in STATE), (run / "metrics.jsonl").read_bytes()]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call `act` when the metrics of `step` are written."""
    write = run_dir.JsonlWriter.write

    def write_and_act(self: run_dir.JsonlWriter, values: dict[str, Any]) -> None:
        write(self, values)
        if values["step"] == step and self.path.name == run_dir.METRICS:
            act()

    monkeypatch.setattr(run_dir.JsonlWriter, "write", write_and_act)


def test_sigterm_saves_and_leaves_with_143(
    tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a scheduler's SIGTERM loses the steps since the last checkpoint, or the run that goes on differs."""
    config = tiny(training={"total_steps": 12})
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as caught:
            run_script(lambda: train(config, is_resume=False))
    assert caught.value.code == 143
    assert "terminated after step 7, which is saved; continue with --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run = Path(config.output_dir)
    assert checkpoint.resolve(run).name == "step-0000007"
    train(config, is_resume=True)
    whole = tiny(training={"total_steps": 12}, output_dir=str(tmp_path / "whole"))
    train(whole, is_resume=False)
    assert bits(run, 12) == bits(Path(whole.output_dir), 12)


def test_training_goes_on_while_a_slow_disk_is_written_to(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a step waits for the disk; weights of later steps get into the checkpoint; two writes at once."""
    training = {"total_steps": 12, "checkpoints_kept": 3}
    saved = checkpoint.save
    stepped, writing = threading.Event(), threading.Lock()

    def slow(*arguments: Any) -> Path:
        assert writing.acquire(blocking=False)
        assert arguments[1] != 5 or stepped.wait(60)  # step 9 is trained while the checkpoint of step 5 is written
        folder = saved(*arguments)
        writing.release()
        return folder

    monkeypatch.setattr(checkpoint, "save", slow)
    at_step(monkeypatch, 9, stepped.set)
    config = tiny(training=training)
    train(config, is_resume=False)
    monkeypatch.undo()
    quick = tiny(training=training, output_dir=f"{config.output_dir}-quick")
    train(quick, is_resume=False)
    for step in (5, 10, 12):
        assert bits(Path(config.output_dir), step) == bits(Path(quick.output_dir), step)


def test_a_disk_that_fills_in_the_background_is_told(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    """Bug: the thread that writes dies alone, and the run goes on without checkpoints or ends as if all were well."""
    saved = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-0000010" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    config = tiny(training={"total_steps": 10})  # the last one: nobody asks for it but the end of the run
    message = fails(lambda: train(config, is_resume=False))
    assert "step-0000010 cannot be written" in message
    assert "No space left" in message
    assert checkpoint.resolve(Path(config.output_dir)).name == "step-0000005"


def test_the_error_that_ends_a_run_is_not_hidden_by_the_writer() -> None:
    """Bug: of two errors the second replaces the first; work is lost when the run ends."""
    done: list[int] = []
    with AsyncWriter() as writing:
        writing.start(lambda: done.append(1))
    assert done == [1]

    def fail() -> None:
        raise checkpoint.CheckpointError("disk")

    def both() -> None:
        with AsyncWriter() as writing:
            writing.start(fail)
            raise ValueError("first")

    def alone() -> None:
        with AsyncWriter() as writing:
            writing.start(fail)

    with pytest.raises(ValueError, match="first"):
        both()
    with pytest.raises(checkpoint.CheckpointError, match="disk"):
        alone()


AT_STEP_2 = """
import multiprocessing, pathlib, sys
from mamo.cli import run
from mamo.tasks.registry import load_config
from mamo.trainer import train
from mamo.training.loop import Loop

step = Loop.step

def act_then_step(self, batch, number):
    if number == 2:
        exec(sys.argv[2])
    return step(self, batch, number)

Loop.step = act_then_step
run(lambda: train(load_config(pathlib.Path(sys.argv[1])), is_resume=False))
"""


def run_with_a_loader(file: Path, at_step_2: str) -> tuple[int, str]:
    """Exit code and the one line of error; PyTorch's signal handler must not meet pytest."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_STEP_2, str(file), at_step_2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    (line,) = lines
    return done.returncode, line


@pytest.mark.parametrize("where", ["anywhere", "outside the loader"])
def test_a_dead_loader_is_one_clear_error(tiny_file: Callable[..., Path], where: str) -> None:
    """Bug: a loader killed for want of memory ends in a traceback of PyTorch, or the run waits for it for ever; PyTorch
    tells it by a signal, and only where batches are taken it is understood."""
    file = tiny_file(data={"workers": 1}, training={"total_steps": 400, "device": "cpu", "precision": "fp32"})
    wait = "; import time; time.sleep(60)" if where == "outside the loader" else ""  # the signal ends the sleep
    code, line = run_with_a_loader(file, "multiprocessing.active_children()[0].kill()" + wait)
    assert code == 2
    assert "a data loader worker died" in line
    assert "data.workers (now 1)" in line


@pytest.mark.parametrize(
    "raised",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        UnpicklingError("pickle data was truncated"),
        RuntimeError("received 0 items of ancillary data"),
    ],
)
def test_a_loader_that_dies_while_it_hands_over_is_the_same_error(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    """Bug: only PyTorch's own words for a dead loader are understood; a socket that broke off ends in a traceback."""

    def broken(*_: object) -> Iterator[None]:
        raise raised
        yield

    monkeypatch.setattr("mamo.trainer.iterate", broken)
    with pytest.raises(ChildProcessError, match=r"a data loader worker died.*data.workers"):
        train(tiny(), is_resume=False)


def test_an_error_in_a_step_ends_the_loaders_too(tiny_file: Callable[..., Path]) -> None:
    """Bug: loaders ignore SIGTERM, by which Python ends children at exit, so a run never exits whose error is kept, and
    with it the loader in its traceback (TensorBoard's writer keeps its own)."""
    file = tiny_file(data={"workers": 1}, training={"total_steps": 400, "device": "cpu", "precision": "fp32"})
    code, line = run_with_a_loader(
        file, "sys.kept = OSError(28, 'No space left on device', 'tensorboard'); raise sys.kept"
    )
    assert code == 2
    assert "No space left on device" in line


@pytest.mark.parametrize("outlasts_error", [True, False])
def test_sigterm_does_not_cut_off_what_a_process_has_to_tell(outlasts_error: bool) -> None:
    """Bug: one of two processes dies, and torchrun ends the other before it has said so."""
    code = (
        "import os, signal\n"
        "from mamo.training.preemption import PreemptionHandler\n"
        "try:\n"
        f"    with PreemptionHandler(outlasts_error={outlasts_error}):\n"
        "        raise RuntimeError('lost contact')\n"
        "except RuntimeError as error:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == ((0, "lost contact\n") if outlasts_error else (-signal.SIGTERM, ""))


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_torchrun_resumes_it(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """Bug: the process that is left waits for the dead one for ever, or the run that goes on ends in other bits."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killer = tmp_path / "killer.py"  # the second process kills itself at its 13th step, the first time
    killer.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from mamo import distributed\nfrom mamo.cli import run\n"
        "from mamo.tasks.registry import load_config\nfrom mamo import trainer\n"
        "from mamo.training.loop import Loop\n"
        "step = Loop.step\n"
        "def deadly(self, batch, number):\n"
        "    if number == 13 and os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch, number)\n"
        "Loop.step = deadly\n"
        "class Late(distributed.RankLostError):\n"  # torchrun's SIGTERM comes before the message, every time
        "    def __init__(self, *told):\n"
        "        time.sleep(2)\n"
        "        super().__init__(*told)\n"
        "distributed.RankLostError = Late\n"
        "run(lambda: trainer.train(load_config(Path(sys.argv[1])), False))\n"
    )
    ends = []
    for name, script in (("whole", [str(ROOT / "scripts/pretrain.py"), "--config"]), ("killed", [str(killer)])):
        config = tiny_file(output_dir=str(tmp_path / name), training={"total_steps": 16})
        command = [*torchrun, "--max-restarts=1", *script, str(config)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert ended.returncode == 0, ended.stderr
        ends.append(bits(tmp_path / name, 16))
    assert "resuming after step 10" in ended.stderr
    assert "process 0 of 2 lost contact with another process, which was killed or failed" in ended.stderr
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_memory_and_step_time_stay_flat(tiny: Callable[..., RunConfig]) -> None:
    """Bug: something is kept from every step: a graph, a batch, a copy of a checkpoint."""
    training = {"total_steps": 2000, "checkpoint_every_steps": 200}
    config = tiny(training=training, losses={"itm_pool_size": 2}, data={"train_scenes": 8})
    train(config, is_resume=False)
    rows = run_dir.read_jsonl(Path(config.output_dir) / run_dir.TIMING)
    memory = [row["peak_memory_mib"] for row in rows]
    assert memory[-1] - memory[500] < 16
    # the fastest tenth: what else the machine does at the time slows the others
    speed = [sorted(row["samples_per_s"] for row in rows[start : start + 500])[450] for start in (500, 1500)]
    assert speed[1] > 0.7 * speed[0]


def test_training_outlives_the_reader_of_its_output(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: `2>&1 | head -1`, or a terminal that closes, ends the training."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    config = tiny(training={"total_steps": 3, "checkpoint_every_steps": 1})
    monkeypatch.setattr(sys, "stderr", Gone())
    run_script(lambda: train(config, is_resume=False))
    assert checkpoint.resolve(Path(config.output_dir)).name == "step-0000003"
