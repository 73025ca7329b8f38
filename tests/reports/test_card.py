"""`scripts/card.py`: the facts of a checkpoint, taken from the checkpoint."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mamo.config.schema import RunConfig
from mamo.trainer import TrainingRun, train

SCRIPT = Path(__file__).parents[2] / "scripts" / "card.py"


def card(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.usefixtures("no_curves")
def test_the_card_tells_what_the_checkpoint_is(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Bug: numbers of another step, a tied weight counted twice, losses that were off, a lost ancestor."""
    short = {"total_steps": 2, "checkpoint_every_steps": 1, "warmup_steps": 1}
    train(tiny(training=short, output_dir=str(tmp_path / "first")), is_resume=False)
    config = tiny(
        training=short,
        output_dir=str(tmp_path / "second"),
        checkpoint=str(tmp_path / "first"),
        losses={"weights": {"mim": 0.0}},
    )
    train(config, is_resume=False)
    entries = [{"protocol": "p", "split": "s", "step": step, "metrics": {"itc/i2t_r1": 10.0 * step}} for step in (1, 2)]
    (tmp_path / "second/results.json").write_text(json.dumps({"evaluations": entries}))
    done = card(str(tmp_path / "second"))
    assert done.returncode == 0, done.stderr
    n_parameters = sum(parameter.numel() for parameter in TrainingRun(config).task.network.parameters())
    assert f"{n_parameters:,} parameters" in done.stdout
    assert "losses itc, itm, mlm, mrm_image, mrm_text |" in done.stdout
    assert "| steps | 2 of 2, 8 samples each, adamw |" in done.stdout
    assert "first/checkpoints/step-0000002, step 2, data `" in done.stdout
    assert "| itc/i2t_r1 | 20.0 |" in done.stdout
    assert "10.0" not in done.stdout

    first = card(str(tmp_path / "first/checkpoints/step-0000001"), "--to", str(tmp_path / "card.md"))
    assert first.returncode == 0, first.stderr
    assert "Random weights." in (tmp_path / "card.md").read_text()
    shutil.copytree(tmp_path / "first/checkpoints/step-0000001", tmp_path / "kept")  # a copy under a name of its own
    assert "| steps | 1 of 2," in card(str(tmp_path / "kept")).stdout
    missing = card(str(tmp_path / "nowhere"))
    assert missing.returncode == 2
    assert "no checkpoint found" in missing.stderr
