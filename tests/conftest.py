"""A run small enough for a test: some hundredths of a second a step."""

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
import yaml

TINY = {
    "seed": 3,
    "data": {"train_scenes": 50, "image_size_px": 16, "text_max_tokens": 24, "workers": 0},  # 6.25 batches an epoch
    "model": {
        "image": {"width": 32, "depth": 1, "heads": 2, "patch_size_px": 8},
        "text": {"width": 32, "heads": 2, "mlp_width": 64, "layers": 1},
        "fusion_layers": 1,
        "itc_width": 16,
        "dropout": 0.1,
    },
    "losses": {"queue_size": 24, "itm_pool_size": 4},
    "training": {
        "total_steps": 30,
        "batch_size_global": 8,
        "warmup_steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "checkpoint_every_steps": 5,
    },
    "evaluation": {"enabled": False},
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    both = dict(base)
    for key, value in over.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and key in both else value
    return both


@pytest.fixture
def tiny_file(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_file(output_dir=..., section={...})` writes the config file of a tiny run and returns its path."""

    def write(**over: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(merged({**TINY, "output_dir": str(tmp_path / "run")}, over)))
        return path

    return write


@pytest.fixture
def tiny(tiny_file: Callable[..., Path]) -> Callable[..., Any]:
    """The same as a validated config."""
    from mamo.tasks.registry import load_config

    return lambda **over: load_config(tiny_file(**over))


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
    from mamo.tasks.registry import build_config

    short = {"training": {"total_steps": 2, "checkpoint_every_steps": 1, "warmup_steps": 1}}
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamo.trainer, "plot_curves", lambda *_: None)
        mamo.trainer.train(build_config(merged({**TINY, "output_dir": str(folder)}, short)), is_resume=False)
    return folder
