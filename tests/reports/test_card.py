"""`mamo card`: the facts of a checkpoint, taken from the checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mamo.cli import main
from mamo.config.schema import RunConfig
from mamo.trainer import TrainingRun, train


@pytest.mark.usefixtures("no_curves")
def test_the_card_describes_the_checkpoint(
    tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
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
    capsys.readouterr()
    main(["card", str(tmp_path / "second")])
    card = capsys.readouterr().out
    n_parameters = sum(parameter.numel() for parameter in TrainingRun(config).task.network.parameters())
    assert f"{n_parameters:,} parameters" in card
    assert "losses itc, itm, mlm, mrm_image, mrm_text |" in card
    assert "| steps | 2 of 2, 8 samples each, adamw |" in card
    assert "first/checkpoints/step-0000002, step 2, data `" in card
    assert "| itc/i2t_r1 | 20.0 |" in card
    assert "10.0" not in card

    main(["card", str(tmp_path / "first/checkpoints/step-0000001"), "--to", str(tmp_path / "card.md")])
    assert capsys.readouterr().out == ""
    assert "Random weights." in (tmp_path / "card.md").read_text()
    shutil.copytree(tmp_path / "first/checkpoints/step-0000001", tmp_path / "kept")  # a copy under a name of its own
    main(["card", str(tmp_path / "kept")])
    assert "| steps | 1 of 2," in capsys.readouterr().out
    assert "no checkpoint found" in fails(lambda: main(["card", str(tmp_path / "nowhere")]))
