"""Fixtures: the tiny run that most tests train, and how a command fails."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")
# One thread, whatever the shell says: sums are then in one order in fixtures, tests and child processes, and a forked
# child would wait for its parent's threads for ever.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no path fails at once instead of after many retries

import pytest

LONGEST = (
    *("test_readme.py", "test_combinations.py", "test_study.py", "test_layouts.py", "test_pipeline.py"),
    *("test_guard.py", "test_processes.py", "test_interruptions.py", "test_resume.py", "test_compare.py"),
)
"""Files that take longest. They begin first, so that none is left to one process while the others are done."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of the files when several processes share them; by default those with most tests come first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture
def tiny_file(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_file(output_dir=..., section={...})` writes the config file of a tiny run and returns its path."""
    from tests.tiny import values_of, write_config  # here: it imports PyTorch, which many tests do without

    return lambda **over: write_config(
        tmp_path / "tiny.yaml", values_of(**{"output_dir": str(tmp_path / "run"), **over})
    )


@pytest.fixture
def tiny(tiny_file: Callable[..., Path]) -> Callable[..., Any]:
    """The same as a validated config."""
    from mamo.tasks.registry import load_config

    return lambda **over: load_config(tiny_file(**over))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the thread that ends a slow process after SIGTERM from ending the tests."""
    from mamo.training import preemption

    monkeypatch.setattr(preemption, "GRACE_S", 600.0)
    monkeypatch.setattr(preemption, "IMPATIENCE_S", 600.0)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the picture, which takes longer than the run."""
    import mamo.trainer

    monkeypatch.setattr(mamo.trainer, "plot_curves", lambda *_: None)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], None]], str]:
    """`fails(work)` runs `work` as a script does; returns the one message that it must end with, at exit code 2."""
    from mamo.cli import run

    def check(work: Callable[[], None]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(work)
        assert caught.value.code == 2
        output = capsys.readouterr().err
        assert "Traceback" not in output
        _, found, message = ("\n" + output).partition("\nerror: ")
        assert found
        assert "\nerror: " not in message
        return message

    return check


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pre-trained run of two steps, to fine-tune from; not to be written to."""
    import mamo.trainer
    from tests.tiny import TWO_STEPS, config_of

    folder = tmp_path_factory.mktemp("pretrained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamo.trainer, "plot_curves", lambda *_: None)
        mamo.trainer.train(config_of(output_dir=str(folder), training=TWO_STEPS), is_resume=False)
    return folder
