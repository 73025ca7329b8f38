"""Runs against reference curves: planted ones for every way to leave the band, and real ones (slow)."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import init_weights_vit_timm

from mamo import trainer
from mamo.reports import curves
from mamo.reports.compare import PACE, PATIENCE, WINDOW, band, compare_runs, running_mean
from mamo.tasks.pretrain import task as pretrain_task
from mamo.tasks.registry import load_config

ROOT = Path(__file__).parents[2]
T = 300
CURVES: dict[str, tuple[float, float, float]] = {  # start, end, steps to fall by a factor e
    "loss/itc": (4.2, 2.0, 120.0),
    "loss/itm": (0.64, 0.4, 90.0),
    "loss/mlm": (5.6, 1.5, 60.0),
    "loss/mim": (1.0, 0.3, 40.0),
    "loss/mrm_image": (2.0, 0.1, 30.0),
    "loss/mrm_text": (2.0, 0.2, 30.0),
    "teacher_spread/image": (0.2, 0.8, 100.0),
    "teacher_spread/text": (0.2, 0.8, 100.0),
    "teacher_spread/fused_text": (0.5, 0.8, 100.0),
    "gradient_norm": (20.0, 3.0, 30.0),
}


def write(folder: Path, rows: list[dict[str, float]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(
    seed: int, change: Callable[[str, int, float], float] = lambda name, step, value: value, pace: float = 1.0
) -> list[dict[str, float]]:
    """Planted curves: exponential falls, 4 % noise a step, 1 % between seeds; each value passes through `change`."""
    draws = np.random.default_rng(seed)
    level = {name: 1 + 0.01 * draws.standard_normal() for name in CURVES}
    made = []
    for step in range(1, T + 1):
        row: dict[str, float] = {"step": step}
        for name, (start, end, scale) in CURVES.items():
            value = end + (start - end) * np.exp(-step * pace / scale)
            row[name] = change(name, step, value * level[name] * (1 + 0.04 * draws.standard_normal()))
        made.append({**row, "itm_accuracy": 0.5, "weight/itc": 1.0, "learning_rate": 1e-3 * min(1, step / 50)})
    return made


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write(tmp_path / "reference", rows(0))


@pytest.mark.parametrize("seed", range(1, 21))
def test_another_seed_is_inside(reference: Path, tmp_path: Path, seed: int) -> None:
    """Bug: a band so narrow that chance leaves it, or so wide that nothing does."""
    pace = 1 + 0.15 * np.sin(seed)
    assert compare_runs(write(tmp_path / "run", rows(seed, pace=pace)), reference).deviations == ()
    assert compare_runs(write(tmp_path / "run", rows(seed, pace=1 / 2.2)), reference).deviations


@pytest.mark.parametrize(
    ("change", "metric", "steps", "cause"),
    [
        (lambda n, s, v: v * 3 if n == "loss/mlm" and s >= 100 else v, "loss/mlm", (100, 112), "learning is slower"),
        (lambda n, s, v: v / 3 if n == "loss/mlm" and s >= 100 else v, "loss/mlm", (100, 112), "masked words leak"),
        (lambda n, s, v: v * 2 if n == "loss/itc" else v, "loss/itc", (1, 1), "learning is slower"),
        (lambda n, s, v: v / 2 if n == "loss/itm" else v, "loss/itm", (1, 1), "learning is faster"),
        (lambda n, s, v: v / 500 if n == "loss/mim" else v, "loss/mim", (1, 1), "masked patches leak"),
        (lambda n, s, v: v / 500 if n == "loss/mrm_text" else v, "loss/mrm_text", (1, 1), "collapse"),
        (lambda n, s, v: v / 50 if n == "teacher_spread/image" else v, "teacher_spread/image", (1, 1), "image encoder"),
        (lambda n, s, v: v / 50 if n == "teacher_spread/text" else v, "teacher_spread/text", (1, 1), "text encoder"),
        (lambda n, s, v: v / 50 if "fused" in n else v, "teacher_spread/fused_text", (1, 1), "collapsing"),
        (lambda n, s, v: v * 50 if "fused" in n else v, "teacher_spread/fused_text", (1, 1), "not formed"),
        (lambda n, s, v: v / 9 if n == "gradient_norm" else v, "gradient_norm", (1, 1), "gets no gradient"),
        (lambda n, s, v: v * 9 if n == "gradient_norm" else v, "gradient_norm", (1, 1), "too high"),
    ],
)
def test_a_deviation_is_named(
    reference: Path, tmp_path: Path, change: Any, metric: str, steps: tuple[int, int], cause: str
) -> None:
    """Bug: the wrong metric or step is blamed, one side of the band is open, the cause is of the other side."""
    verdict = compare_runs(write(tmp_path / "run", rows(5, change)), reference)
    first = verdict.deviations[0]
    assert first.metric == metric
    assert steps[0] <= first.step <= steps[1]
    assert cause in first.cause
    assert first.cause in "\n".join(verdict.lines())
    assert len(verdict.deviations) == 1


def test_settings_must_be_equal(reference: Path, tmp_path: Path) -> None:
    """Bug: a learning rate that is another only late, or another loss weight, hides in a band made for noise."""
    made = rows(5)
    for row in made[249:]:
        row["learning_rate"] *= 1.01
    (deviation,) = compare_runs(write(tmp_path / "run", made), reference).deviations
    assert (deviation.metric, deviation.step) == ("learning_rate", 250)
    assert "training.learning_rate" in deviation.cause
    (deviation,) = compare_runs(
        write(tmp_path / "run", [{**r, "weight/itc": 2.0} for r in rows(5)]), reference
    ).deviations
    assert (deviation.metric, deviation.step) == ("weight/itc", 1)


def test_a_loss_that_is_not_there(reference: Path, tmp_path: Path) -> None:
    """Bug: a switched-off loss ends in a traceback, or passes since there is nothing to compare."""
    without = [{name: value for name, value in row.items() if name != "loss/mim"} for row in rows(5)]
    (deviation,) = compare_runs(write(tmp_path / "run", without), reference).deviations
    assert (deviation.metric, deviation.step) == ("loss/mim", 1)
    assert "switched off" in deviation.cause
    verdict = compare_runs(reference, write(tmp_path / "run", without))
    assert verdict.deviations == ()
    assert "only in the run: loss/mim" in verdict.lines()


def test_several_seeds_widen_and_narrow_the_band(tmp_path: Path) -> None:
    """Bug: the other seeds of a reference are not read; where they agree, what is supposed of seeds still rules."""

    def shifted(factor: float, name: str) -> Callable[[str, int, float], float]:
        return lambda n, s, v: v * factor if n == name else v

    apart, close = tmp_path / "apart", tmp_path / "close"
    for seed, factor in enumerate((0.85, 1.0, 1.2)):
        write(apart / f"seed-{seed}", rows(seed, shifted(factor, "loss/mlm")))
        write(close / f"seed-{seed}", rows(seed))
    run = write(tmp_path / "run", rows(7, shifted(1.4, "loss/mlm")))
    assert compare_runs(run, apart).deviations == ()
    assert compare_runs(run, close).deviations[0].metric == "loss/mlm"
    assert compare_runs(run, close).n_references == 3
    run = write(tmp_path / "run", rows(7, shifted(12.0, "loss/mim")))
    assert compare_runs(run, close / "seed-0").deviations == ()
    assert compare_runs(run, close).deviations[0].metric == "loss/mim"


def test_the_green_band_is_the_one_that_runs_are_compared_with(
    tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: curves.png draws another band, or another line in it, than `compare_runs` judges a run by."""
    from matplotlib.axes import Axes

    drawn: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    areas: list[tuple[Axes, Any]] = []
    monkeypatch.setattr(Axes, "fill_between", lambda axis, *area, **style: areas.append((axis, area)))
    monkeypatch.setattr(curves, "CLONE", tmp_path)
    late = write(tmp_path / "run", rows(5, lambda n, s, v: v * 3 if n == "loss/mlm" and s >= 100 else v))
    reference = tmp_path / "configs/reference/recipe"
    for seed, folder in enumerate((reference, reference / "second", late)):
        folder.mkdir(parents=True, exist_ok=True)
        if folder != late:
            write(folder, rows(seed))
        (folder / "config.yaml").write_text(tiny_file(output_dir=folder.name).read_text())
    curves.plot_curves(late, load_config)
    drawn = {axis.get_title(): area for axis, area in areas}
    line = {axis.get_title(): axis.lines[-1].get_ydata() for axis, _ in areas}
    _, low, high = drawn["loss/mlm"]
    outside = (line["loss/mlm"] < low) | (line["loss/mlm"] > high)
    (deviation,) = compare_runs(late, reference).deviations
    first = 1 + int(np.argmax([outside[k : k + PATIENCE].all() for k in range(T)]))
    assert (deviation.metric, deviation.step) == ("loss/mlm", first)
    for name in ("loss/itc", "gradient_norm"):
        _, low, high = drawn[name]
        assert ((low <= line[name]) & (line[name] <= high)).all()


def test_an_unfinished_run_and_differing_settings(reference: Path, tmp_path: Path) -> None:
    """Bug: what a run has not reached yet counts as a deviation, or is passed over in silence."""
    run = write(tmp_path / "run", rows(5)[:80])
    (run / "config.yaml").write_text("output_dir: a\nseed: 1\ntraining: {total_steps: 80, warmup_steps: 5}\n")
    (reference / "config.yaml").write_text("output_dir: b\nseed: 2\ntraining: {total_steps: 300, warmup_steps: 5}\n")
    verdict = compare_runs(run, reference)
    assert verdict.deviations == ()
    assert verdict.n_steps == 80
    assert "the run has 80 of the reference's 300 steps: only these were compared" in verdict.lines()
    assert "config.yaml: training.total_steps is 80, in the reference 300" in verdict.lines()
    assert not any("seed" in line or "warmup" in line for line in verdict.lines())


def test_final_results(reference: Path, tmp_path: Path) -> None:
    """Bug: results of another protocol or step are compared; a run that learned nothing passes on its losses."""

    def results(folder: Path, value: float, protocol: str = "p") -> None:
        entry = {"protocol": protocol, "step": 300, "metrics": {"rerank/i2t_r1": value}}
        (folder / "results.json").write_text(json.dumps({"evaluations": [entry]}))

    run = write(tmp_path / "run", rows(5))
    results(reference, 68.0)
    for value, is_inside in ((60.0, True), (76.0, True), (50.0, False), (90.0, False)):
        results(run, value)
        assert (compare_runs(run, reference).deviations == ()) == is_inside, value
    assert "rerank/i2t_r1 at the end: 90, the reference's band is 58 to 78" in "\n".join(
        compare_runs(run, reference).lines()
    )
    results(run, 1.0, "another")
    assert compare_runs(run, reference).deviations == ()


def test_a_sum_of_six_recalls_is_not_held_to_the_band_of_one(reference: Path, tmp_path: Path) -> None:
    """Bug: a good run is refused, since six recalls 4 points lower add up to 24; or a bad recall hides in its sum."""

    def results(folder: Path, recalls: list[float]) -> None:
        names = [f"itc/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
        metrics = dict(zip(names, recalls)) | {"itc/rsum": sum(recalls)}
        entry = {"protocol": "p", "step": 300, "metrics": metrics}
        (folder / "results.json").write_text(json.dumps({"evaluations": [entry]}))

    run = write(tmp_path / "run", rows(5))
    results(reference, [60.0, 80.0, 90.0] * 2)
    results(run, [56.0, 76.0, 86.0] * 2)
    assert compare_runs(run, reference).deviations == ()
    results(run, [45.0, 85.0, 95.0] * 2)
    assert {found.metric for found in compare_runs(run, reference).deviations} == {"itc/i2t_r1", "itc/t2i_r1"}


def test_the_band_from_its_definition() -> None:
    """Bug: the pace goes the wrong way, or noise is averaged by another number than the smoothing has."""
    steps = np.arange(1, T + 1, dtype=float)
    curve = 5 * np.exp(-steps / 100)
    low, high = band(curve[None], steps, 0.0)
    smooth = np.exp(running_mean(np.log(curve)))
    at = 199  # step 200
    noise = 3.5 * np.sqrt(2 * (0.01**2 / 2) / WINDOW)  # neighbours differ by 1 % on this curve
    assert high[at] == pytest.approx(smooth[int(np.ceil(200 / PACE)) - 1] * np.exp(noise), rel=1e-3)
    assert low[at] == pytest.approx(smooth[int(200 * PACE) - 1] * np.exp(-noise), rel=1e-3)
    flat = np.full((1, T), 2.0)
    low, high = band(flat, steps, 0.1)
    assert high[50] == pytest.approx(2 * np.exp(3.5 * np.sqrt(2) * 0.1))
    assert low[50] == pytest.approx(2 * np.exp(-3.5 * np.sqrt(2) * 0.1))
    assert running_mean(np.arange(100.0))[[0, 1, 99]].tolist() == [0.0, 0.5, np.mean(np.arange(100 - WINDOW, 100))]


def test_the_script(reference: Path, tmp_path: Path) -> None:
    """Bug: exit codes that a CI job cannot use; a mistyped folder ends in a traceback."""

    def run(*arguments: Path) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "scripts/compare.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    assert run(write(tmp_path / "run", rows(5)), reference)[0] == 0
    code, text = run(write(tmp_path / "run", rows(5, lambda n, s, v: v * 2 if n == "loss/itc" else v)), reference)
    assert code == 1
    assert re.search(r"first: loss/itc at step 1: .*\nusual cause: learning is slower", text)
    assert run(tmp_path / "nowhere", reference)[0] == 2


def test_bad_folders_are_named(reference: Path, tmp_path: Path) -> None:
    """Bug: an empty or damaged file counts as inside."""
    for text, message in (
        ("", r"no steps in this file"),
        ("{", r"not a metrics file"),
        ("[1]", r"not a metrics file"),
        ('{"step": 900, "loss/itc": 1}', "no step in common"),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            compare_runs(tmp_path / "run", reference)
    with pytest.raises(ValueError, match=r"no metrics\.jsonl here or one level below"):
        compare_runs(reference, tmp_path / "run" / "none")


SMALL = {
    "data": {"train_scenes": 1_000_000, "image_size_px": 48, "text_max_tokens": 40},
    "model": {
        "image": {"patch_size_px": 12, "width": 64, "depth": 2, "heads": 2},
        "text": {"width": 64, "heads": 2, "mlp_width": 128, "layers": 1},
        "fusion_layers": 1,
        "itc_width": 32,
        "dropout": 0.0,
    },
    "losses": {"queue_size": 0, "itm_pool_size": 16},
    "training": {
        "total_steps": 220,
        "batch_size_global": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 10,
        "adam_beta2": 0.98,
        "checkpoint_every_steps": 1000,
    },
    "teacher": {"momentum": 0.99},
}
TAMPERED = {  # what is changed -> a metric that shows it
    "learning rate x3": "loss/mlm",
    "learning rate /3": "loss/mlm",
    "frozen image encoder": "loss/itc",
    "frozen text encoder": "loss/mlm",
    "no image init": "teacher_spread/image",
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_real_runs(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: another seed leaves the band of real curves, or a tampered run stays inside, its logged settings aside."""
    build = pretrain_task.build_network

    def tampered(how: str) -> Callable[..., Any]:
        def changed(*arguments: Any) -> Any:
            network = build(*arguments)
            encoder = network.backbone.image_encoder
            if how == "no image init":
                for module in encoder.modules():
                    init_weights_vit_timm(module)
                torch.nn.init.trunc_normal_(encoder.vit.pos_embed, std=0.02)
            elif how.startswith("frozen"):
                (encoder if "image" in how else network.backbone.text_encoder).requires_grad_(False)
            return network

        return changed

    def train(how: str, seed: int, folder: Path) -> Path:
        factor = {"learning rate x3": 3.0, "learning rate /3": 1 / 3}.get(how, 1.0)
        training = {**SMALL["training"], "learning_rate": 2e-3 * factor}
        monkeypatch.setattr(pretrain_task, "build_network", tampered(how))
        trainer.train(tiny(**{**SMALL, "training": training}, seed=seed, output_dir=str(folder)), False)
        made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "config.yaml").unlink()
        return write(folder, [{**row, "learning_rate": 1.0} for row in made])  # the curves alone shall tell

    reference = train("", 0, tmp_path / "reference")
    for seed in (1, 2):
        verdict = compare_runs(train("", seed, tmp_path / f"good-{seed}"), reference)
        assert verdict.deviations == (), verdict.lines()
    for how, metric in TAMPERED.items():
        verdict = compare_runs(train(how, 5, tmp_path / how), reference)
        assert metric in {deviation.metric for deviation in verdict.deviations}, (how, verdict.lines())


def test_a_run_is_no_reference_of_its_own(tmp_path: Path) -> None:
    """Bug: a run in the folder of its references widens the band by its own deviation."""
    for seed in (0, 1, 2):
        write(tmp_path / f"seed{seed}", rows(seed))
    own = write(tmp_path / "own", rows(3))
    assert compare_runs(own, tmp_path).n_references == 3
    (tmp_path / "link").symlink_to(own)
    assert compare_runs(tmp_path / "link", tmp_path).n_references == 3
    with pytest.raises(ValueError, match="except the run itself"):
        compare_runs(own, own)
