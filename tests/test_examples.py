"""The examples extend the method from a folder of their own: trained, resumed, evaluated, carded, exported."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mamo
from mamo.cli import main
from mamo.imports import add_folder_of, import_class, no_code_from
from mamo.models.towers import ImageTower
from mamo.tasks.objective import Loss
from mamo.tasks.registry import build_config, load_config, task_class
from mamo.trainer import TrainingRun
from tests import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = ("filip", "convnext_tower", "prenorm_text", "masked_caption_plan", "ranking")
SHORT = ["training.total_steps=4", "training.warmup_steps=1", "training.checkpoint_every_steps=2"]
SMALL = ["evaluation.retrieval_items=8", "evaluation.probe_items=8", "training.device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, away from the package; the Python path is put back afterwards."""
    before = list(sys.path)
    copy = Path(shutil.copytree(ROOT / "scripts/examples", tmp_path_factory.mktemp("mine") / "examples"))
    yield copy
    sys.path[:] = before


def test_examples_are_short() -> None:
    """Bug: extending takes more than a page."""
    files = sorted((ROOT / "scripts/examples").glob("*.py"))
    assert [file.stem for file in files] == sorted(EXAMPLES)
    for file in files:
        assert len(file.read_text().splitlines()) <= 60, file


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_goes_through_everything(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a list of names that an extension is not on: in loading, freezing, saving, fine-tuning, cards or exports."""
    monkeypatch.chdir(folder)
    workers = int(name == "filip")  # in a process of its own, which takes seconds to start
    main(["pretrain", "--config", f"{name}.yaml", *SHORT, *SMALL, f"data.workers={workers}"])
    run = folder / "runs" / name
    before = load_file(run / "checkpoints/last/student.safetensors")
    shutil.rmtree(run / "checkpoints/step-0000004")
    main(["pretrain", "--config", f"{name}.yaml", *SHORT, *SMALL, "--resume", "data.workers=0"])
    after = load_file(run / "checkpoints/last/student.safetensors")
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    main(["card", str(run)])
    assert "| steps | 4 of 4" in capsys.readouterr().out
    if name == "ranking":
        (entry,) = json.loads((run / "results.json").read_text())["evaluations"]
        assert 0 <= entry["metrics"]["ranking/accuracy"] <= 100
    else:
        entry = main_evaluate(run)
        assert "itc/i2t_r1" in entry["metrics"]
    model = mamo.load(run, device="cpu")
    model.save_pretrained(folder / f"{name}-exported")
    again = mamo.load(folder / f"{name}-exported", device="cpu")
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])


def main_evaluate(run: Path) -> dict:
    """Evaluate a run by the command; return the entry."""
    to = run / "again"
    main(["evaluate", f"checkpoint={run}", "protocol=scenes-easy-zeroshot", f"output_dir={to}", *SMALL[:2]])
    (entry,) = json.loads((to / "results.json").read_text())["evaluations"]
    return entry


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_trainable_tensor_of_an_example_learns(name: str, folder: Path, tmp_path: Path) -> None:
    """Bug: an extension whose parameters are frozen or forgotten by the optimizer, with no line that says so (P11)."""
    file = folder / f"{name}.yaml"
    add_folder_of(file)
    run = TrainingRun(load_config(file, [f"output_dir={tmp_path / name}", "training.device=cpu", "data.workers=0"]))
    loop = run.dry_run_loop("fp32", tmp_path)
    loop.backward(run.example_batch(run.config.training.batch_size_global), 0)
    trainable = {key: value for key, value in run.task.network.named_parameters() if value.requires_grad}
    # what is added to all scores alike leaves their differences and the softmax over keys as they are
    dead = ("fusion.layers.0.norm2.bias",) if name == "ranking" else ()
    assert [k for k, v in trainable.items() if not v.grad.any() and not k.endswith(("key.bias", *dead))] == []
    optimized = {id(value) for group in run.optimizer.param_groups for value in group["params"]}
    assert optimized == {id(value) for value in trainable.values()}
    own = {"filip": "filip.image.weight", "ranking": "rank.weight", "convnext_tower": "backbone.image_encoder.colour"}
    own["prenorm_text"] = "backbone.text_encoder.positions"
    assert own.get(name, "backbone.fusion.mask_token") in trainable


@pytest.mark.usefixtures("no_curves")
def test_a_fine_tuning_starts_from_an_example(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug: a checkpoint with one more head cannot be fine-tuned from: head names are a list."""
    monkeypatch.chdir(folder)
    if not (folder / "runs/filip").exists():
        main(["pretrain", "--config", "filip.yaml", *SHORT, *SMALL, "data.workers=0"])
    values = {
        "output_dir": str(tmp_path / "tuned"),
        "task": "vqa",
        "data": {"train_scenes": 30},
        "vqa": {"answer_min_count": 1},
    }
    values["training"] = {"batch_size_global": 8, "precision": "fp32"}
    (tmp_path / "vqa.yaml").write_text(yaml.safe_dump(values))
    config = str(tmp_path / "vqa.yaml")
    main(["finetune", "--config", config, "checkpoint=runs/filip", *SHORT, *SMALL, "data.workers=0"])
    assert (tmp_path / "tuned/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_two_processes_train_an_example(name: str, folder: Path) -> None:
    """Bug: an extension that works in one process only."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "scripts/pretrain.py")]
    small = [*SHORT, *SMALL, f"output_dir=runs/{name}-two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command, "--config", f"{name}.yaml", *small],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


BAD = {
    "absent:Thing": "no module 'absent'",
    "filip:Nothing": "has no 'Nothing'; its classes are",
    "filip:FilipHead": "is no Loss",
    "broken:Thing": "cannot be imported: SyntaxError",
    "lacking:Thing": "lacks __call__ of Loss",
    "needs_absent:Thing": "needs the module 'absent_library'",
}


@pytest.mark.parametrize("path", BAD)
def test_a_wrong_class_is_one_clear_line(path: str, folder: Path) -> None:
    """Bug: a traceback, or a message that names neither key nor class."""
    (folder / "broken.py").write_text("def (:\n")
    (folder / "needs_absent.py").write_text("import absent_library\n")
    (folder / "lacking.py").write_text("from mamo.tasks.objective import Loss\n\nclass Thing(Loss):\n    name = 'x'\n")
    add_folder_of(folder / "filip.yaml")
    with pytest.raises(ValueError, match=r"^losses\.extra\.0: ") as caught:
        import_class(path, Loss, "losses.extra.0")
    assert BAD[path] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "absent:Task"}, "task: no module 'absent'"),
        ({"task": "filip:Filip"}, "task: filip:Filip is no Task"),
        ({"task": "pretrian"}, "did you mean `pretrain`?"),
        ({"losses": {"extra": ["filip"]}}, "give the class as module:Class"),
        ({"losses": {"extra": [{"class": "filip:Filip", "wdith": 3}]}}, "losses.extra.0.wdith"),
        ({"losses": {"extra": [{"class": "filip:Filip", "weight": 0}]}}, "losses.extra.0.weight"),
        ({"masking": {"plan": "filip:Filip"}}, "masking.plan: filip:Filip is no tuple"),
        ({"model": {"image": {"name": "filip:Filip"}}}, "model.image.name: filip:Filip is no ImageTower"),
        ({"model": {"image": {"settings": {"a": 1}}}}, "model.image.settings"),
        ({"model": {"text": {"name": "bert"}}}, "model.text.name"),
    ],
)
def test_mistakes_in_names_are_reported_before_training(
    values: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    """Bug: a bare KeyError for an unknown task, a class of another kind that fails in a step."""
    add_folder_of(folder / "filip.yaml")
    with pytest.raises(ValueError) as caught:
        mamo.build({**values})
    assert message in str(caught.value)


def test_a_loss_that_returns_no_metrics_is_named(tmp_path: Path) -> None:
    """Bug: "iteration over a 0-d tensor", in a traceback, for a loss of one's own."""
    run = TrainingRun(tiny.config_of(output_dir=str(tmp_path)))
    (first, *_) = run.task.active
    run.task.active = (first, type("Bare", (type(first),), {"__call__": lambda *_: torch.zeros(())})(run.config))
    with pytest.raises(ValueError, match=r"loss itc: Bare must return \(share of the loss, metrics"):
        run.dry_run_loop("fp32", tmp_path).backward(run.example_batch(8), 0)


def test_two_files_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: of two classes of one import path the first found is trained, without a word."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_named.py").write_text("from mamo.tasks.objective import Loss\n")
        add_folder_of(tmp_path / name / "config.yaml")
    with pytest.raises(ValueError, match=r"k: same_named:Loss may be .*one/same_named.py or .*two/same_named.py"):
        import_class("same_named:Loss", Loss, "k")


def test_loading_imports_nothing_from_a_folder_of_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: loading a downloaded checkpoint runs code that came with it."""
    (tmp_path / "evil_module_of_weights.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with no_code_from(tmp_path), pytest.raises(ValueError, match="no module 'evil_module_of_weights'"):
        import_class("evil_module_of_weights:Tower", ImageTower, "model.image.name")
    assert str(tmp_path) in sys.path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:]])
    with no_code_from(tmp_path), pytest.raises(ValueError, match="no module"):
        import_class("evil_module_of_weights:Tower", ImageTower, "model.image.name")


def test_the_package_does_not_know_the_examples() -> None:
    """Bug: a file of the package that names an example."""
    for path in (ROOT / "mamo").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"Filip", "ConvNeXtTower", "PreNormText", "CaptionRanking"}, path
    assert issubclass(task_class("pretrain"), object)
    assert build_config({"output_dir": "x"}).task == "pretrain"
