"""Runs and exports of version 0.1.0 load, evaluate to the same numbers, resume and fine-tune."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mamo
from mamo.evaluator import evaluate
from mamo.tasks.registry import finetune_config, load_config
from mamo.trainer import train

pytestmark = pytest.mark.usefixtures("no_curves")
FIXTURES = Path(__file__).parent / "fixtures" / "version_0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
RUNS = list(EXPECTED["runs"])
FROM_NOTHING = ("pretrain", "cross", "mlim")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fixtures, which the tests may write to."""
    return Path(shutil.copytree(FIXTURES, tmp_path_factory.mktemp("old") / "runs", symlinks=True))


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The losses and metrics of a step, without what says where it ran."""
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_evaluates_to_its_numbers(run: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a weight that is loaded elsewhere or not at all, another default for a key that the old config lacks."""
    monkeypatch.chdir(old)
    expected = EXPECTED["runs"][run]["evaluation"]
    sizes = ["evaluation.retrieval_items=12", "evaluation.probe_items=12"]
    found = evaluate(Path(run), expected["protocol"].removesuffix("-custom"), sizes, old / "evaluated" / run)
    numbers_then = {name: found["metrics"][name] for name in expected["metrics"]}  # others came later
    assert numbers_then == pytest.approx(expected["metrics"], abs=1e-4)
    assert found["protocol"] == expected["protocol"]


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_resumes(run: str, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the optimizer, the queue or the order of samples of an old checkpoint is not taken over."""
    monkeypatch.chdir(old)
    copy = Path(shutil.copytree(old / run, tmp_path / run, symlinks=True))
    if (copy / "checkpoints/step-0000004").exists():
        shutil.rmtree(copy / "checkpoints/step-0000004")
        (copy / "checkpoints/last").unlink()
        (copy / "checkpoints/last").symlink_to("step-0000002")
    file, override = Path(f"configs/{run}.yaml"), [f"output_dir={copy}"]
    config = load_config(file, override) if run in FROM_NOTHING else finetune_config(file, override, is_resume=True)
    train(config, is_resume=True)
    for again, before in zip(steps_of(copy), steps_of(FIXTURES / run), strict=True):
        assert numbers(again) == pytest.approx(numbers(before), rel=1e-4)


@pytest.mark.parametrize("run", [run for run in RUNS if run not in FROM_NOTHING])
def test_an_old_checkpoint_starts_a_fine_tuning(
    run: str, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: heads or positions of an old checkpoint are taken over in another way than before."""
    monkeypatch.chdir(old)
    config = finetune_config(Path(f"configs/{run}.yaml"), [f"output_dir={tmp_path / run}"], is_resume=False)
    train(config, is_resume=False)
    for again, before in zip(steps_of(tmp_path / run), steps_of(FIXTURES / run), strict=True):
        assert numbers(again) == pytest.approx(numbers(before), rel=1e-4)


@pytest.mark.parametrize("name", EXPECTED["exports"])
def test_an_old_export_answers_as_before(name: str) -> None:
    """Bug: an exported model that the hub holds is read with other inputs or weights."""
    given = EXPECTED["api_inputs"]
    a = Image.fromarray((np.arange(40 * 60 * 3).reshape(40, 60, 3) * 7 % 256).astype(np.uint8))
    rows, columns = np.arange(32)[:, None], np.arange(48)
    channels = [rows * 8 + 0 * columns, 0 * rows + columns * 5, np.full((32, 48), 128)]
    b = Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))
    model = mamo.load(FIXTURES / "exported" / name, device="cpu")
    calls = {
        "encode_image": lambda: model.encode_image([a, b]).tolist(),
        "encode_text": lambda: model.encode_text(given["texts"]).tolist(),
        "similarity": lambda: model.similarity([a, b], given["texts"]).tolist(),
        "match": lambda: model.match([a, b, a], given["texts"]).tolist(),
        "answer": lambda: model.answer([a, b], given["questions"]),
        "reason": lambda: model.reason([[a, b], [b, a]], given["sentences"]).tolist(),
        "fill_mask": lambda: [model.fill_mask(image, given["masked"]) for image in (a, b)],
    }
    outputs = EXPECTED["exports"][name]["outputs"]
    for call, expected in outputs.items():
        if call in calls:
            found = calls[call]()
            if isinstance(expected[0], str):
                assert found == expected
            else:
                np.testing.assert_allclose(found, expected, atol=1e-4)
    for call in outputs["missing_heads"]:
        if call in calls:
            with pytest.raises(mamo.MissingHeadError):
                calls[call]()
    assert len(outputs) > 1
