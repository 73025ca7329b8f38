"""The parts in a loop of one's own: the README's snippets run, are short, and train what they say they train."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mamo
from mamo.tasks.registry import build_config
from tests.test_readme import PARTS, ROOT
from tests.tiny import config_of, values_of

SNIPPETS = re.findall(r"^```python\n(.*?)^```", PARTS, re.MULTILINE | re.DOTALL)


def run(part: str) -> dict[str, Any]:
    """The names that the one snippet with `part` in it leaves behind."""
    (code,) = (snippet for snippet in SNIPPETS if part in snippet)
    names: dict[str, Any] = {"__name__": "snippet"}
    torch.manual_seed(0)
    exec(compile(code, part, "exec"), names)
    return names


def test_each_is_short() -> None:
    """Bug: a part that needs half a framework around it."""
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        own = [line for line in snippet.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
        assert len(own) < 20, snippet


def has_moved(module: nn.Module, start: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(module.parameters(), start.parameters(), strict=True))


def test_mrm_in_a_plain_loop() -> None:
    """Bug: the target carries a gradient, the predictor is not trained, the teacher stays or jumps to the student."""
    names = run("mrm_loss")
    student, teacher = names["student"], names["teacher"]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert names["masked"].shape == (8, 12)
    assert names["mask_token"].abs().max() > 0
    assert all(parameter.grad is not None for parameter in names["predictor"].parameters())
    assert has_moved(student, teacher.module)
    cosine = nn.functional.cosine_similarity
    seen, masked, rows = names["seen"].detach(), names["masked"], names["rows"]
    assert seen.shape == (8, 16, 32)
    prediction, target = names["predictor"](student(seen)[rows, masked]), names["target"]
    torch.testing.assert_close(
        names["mrm_loss"](prediction, target, n_global=96), (2 - 2 * cosine(prediction, target, dim=-1)).mean()
    )


def test_a_foreign_text_encoder_is_trained() -> None:
    """Bug: no gradient through fusion into the text encoder; padding that is attended to."""
    names = run("DistilBertModel")
    assert all(parameter.grad is not None for parameter in names["text_encoder"].parameters())
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in names["text_encoder"].parameters())
    fusion, hidden, is_valid = names["fusion"].eval(), names["hidden"].detach(), names["is_valid"]
    image = fusion.embed_image(names["image_tokens"])
    other = torch.where(is_valid[..., None], hidden, 100.0)
    first = fusion.num_image_positions
    torch.testing.assert_close(fusion(image, hidden, is_valid)[:, first], fusion(image, other, is_valid)[:, first])


def test_fusion_on_frozen_clip_towers() -> None:
    """Bug: a gradient in the frozen towers, none in fusion; heat of another grid."""
    names = run("CLIPModel")
    assert all(parameter.grad is None for parameter in names["clip"].parameters())
    trained = dict(names["fusion"].named_parameters())
    assert [name for name, parameter in trained.items() if parameter.grad is None] == ["mask_token"]
    assert names["heat"].shape == (4, 4, 4)
    assert names["heat"].min() >= 0


def test_itc_with_a_queue() -> None:
    """Bug: the queue carries gradients, or loses what was pushed last."""
    names = run("FeatureQueue")
    queue = names["queue"]
    assert int(queue.filled) == 20
    assert not queue.text_feature.requires_grad
    where = [(12 + 12 + k) % 20 for k in range(8)]  # four pushes of eight into twenty places
    assert torch.equal(queue.text_feature[where], names["text"].detach())


@pytest.mark.usefixtures("no_curves")
def test_a_tracker_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Bug: a tracker that is not called, not closed, or has to be edited into the package."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    run("trackers=[Lines()]")
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["1", "2", "done"]
    assert "'loss/itc'" in said
    assert "'data_wait_share'" in said
    assert list((tmp_path / "runs/tracked/tensorboard").glob("events*"))


def test_trackers_are_on_rank_zero_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: every process of a run logs each step."""
    from mamo.training import trackers

    monkeypatch.setattr(trackers, "rank", lambda: 1)
    config = build_config({"output_dir": str(tmp_path / "run")})
    assert trackers.open_trackers(config, 0, [object()]) == []  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_ignored(tmp_path: Path) -> None:
    """Bug: `mamo.build` with a `checkpoint` returns random weights without a word."""
    values = values_of(checkpoint=str(tmp_path / "run"))
    for config in (values, config_of(checkpoint=str(tmp_path / "run"))):
        with pytest.raises(ValueError, match=r"^checkpoint: mamo\.build starts from random .* by mamo\.load\(FOLDER\)"):
            mamo.build(config)
