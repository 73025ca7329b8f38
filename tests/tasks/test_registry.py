"""Every kind of task in the one loop: from a checkpoint to numbers, resumed, planned, split and reproduced."""

import fnmatch
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mamo import estimate
from mamo.config.schema import RunConfig
from mamo.evaluator import evaluate
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.reasoning.batch import ReasoningBatch
from mamo.tasks.registry import CONFIG_TYPES, TASKS, finetune_config, load_config, task_class
from mamo.tasks.vqa.batch import ANSWERS, VqaBatch
from mamo.trainer import TrainingRun, train
from mamo.training import checkpoint
from mamo.training.failure import NonFiniteLoss
from tests.tiny import config_of, finetuning_values, write_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_curves")
CHILDREN: dict[str, tuple[str, dict[str, Any]]] = {  # task and further sections
    "decoder": ("vqa", {}),
    "classifier": ("vqa", {"vqa": {"head": "classifier"}}),
    "reasoning": ("reasoning", {}),
    "entailment": ("entailment", {}),
    "grounding": ("grounding", {}),
}
EVALUATION = {"enabled": True, "probe_items": 6, "batch_size": 4, "rerank_k": 3, "grounding_heat": "image_encoder"}


def child(
    kind: str, pretrained: Path, folder: Path, *overrides: str, is_resume: bool = False, **over: Any
) -> RunConfig:
    """The config of a fine-tuning, as the command makes it."""
    task, sections = CHILDREN[kind]
    values = finetuning_values(task, output_dir=str(folder / kind), **sections, **over)
    file = write_config(folder / f"{kind}.yaml", values)
    return finetune_config(file, [f"checkpoint={pretrained}", *overrides], is_resume)


@pytest.mark.parametrize("kind", CHILDREN)
def test_from_a_checkpoint_to_numbers_and_resumed_to_the_same_bits(
    kind: str, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a second loop that resumes elsewhere, an answer list lost on the way, numbers that need the parent,
    a report of other answers than those that were counted, a last line of the log without the task's number."""
    own = tmp_path / "parent"
    shutil.copytree(pretrained, own, symlinks=True)
    config = child(kind, own, tmp_path, evaluation=EVALUATION)
    with caplog.at_level(logging.INFO):
        train(config, is_resume=False)
    run = Path(config.output_dir)
    last = run / "checkpoints/step-0000002"
    straight, (entry,) = (
        load_file(last / "student.safetensors"),
        json.loads((run / "results.json").read_text())["evaluations"],
    )
    shutil.rmtree(own)
    shutil.rmtree(last)
    train(child(kind, own, tmp_path, evaluation=EVALUATION, is_resume=True), is_resume=True)
    again = load_file(last / "student.safetensors")
    assert straight.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in straight.items())
    assert json.loads((run / "results.json").read_text())["evaluations"] == [entry]

    main = {"decoder": "vqa/accuracy", "classifier": "vqa/accuracy"}.get(kind, f"{kind}/accuracy")
    main = "grounding/proposal" if kind == "grounding" else main
    assert 0 <= entry["metrics"][main] <= 100
    assert f"{main} {entry['metrics'][main]:.1f}" in caplog.text
    assert [link["step"] for link in entry["ancestry"]] == [2]
    protocol, settings = (
        entry["protocol"].removesuffix("-custom"),
        [f"evaluation.{k}={v}" for k, v in EVALUATION.items()],
    )
    later = evaluate(run, protocol, settings, pictures=3 if config.task == "vqa" else 0)
    assert later["metrics"] == entry["metrics"]
    if config.task == "vqa":
        answers = json.loads((last / ANSWERS).read_text())
        assert set(answers) >= {"yes", "no"}
        state = json.loads((last / "state.json").read_text())
        assert len(state["carried"][ANSWERS]) == 64
        submission = json.loads((run / "vqa_results.json").read_text())
        assert [row["question_id"] for row in submission] == list(range(6))
        for folder in (run, run / "evaluations" / protocol):
            shown = (folder / "report.html").read_text()
            _, found, section = shown.partition("<h2>Answers by question type</h2>")
            assert found
            bars = re.findall(r"<td class=n>(\d+)</td><td><div.*?<td class=n>([\d.]+)</td>", section)
            assert sum(int(n) for n, _ in bars) == 6
            mean = sum(int(n) * float(accuracy) for n, accuracy in bars) / 6
            assert mean == pytest.approx(entry["metrics"]["vqa/accuracy"], abs=0.1)


@pytest.mark.parametrize("kind", CHILDREN)
def test_micro_batches_add_up_and_every_parameter_learns(kind: str, pretrained: Path, tmp_path: Path) -> None:
    """Bug: a mean over the micro-batch instead of a share of the batch; a head or a layer that no loss reaches."""
    run = TrainingRun(child(kind, pretrained, tmp_path))
    run.task.network.eval()  # no dropout
    batch = run.example_batch(8)
    losses, gradients = [], []
    for size in (8, 4):
        loop = run.dry_run_loop("fp32", tmp_path)
        loop.micro_batch_size = size
        _, values = loop.backward(batch, 0)
        losses.append({name: float(value) for name, value in values.items()})
        gradients.append({name: p.grad for name, p in run.task.network.named_parameters() if p.grad is not None})
        run.task.network.zero_grad(set_to_none=True)
    assert losses[0].keys() == losses[1].keys()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    wanted = {name for name, p in run.task.network.named_parameters() if p.requires_grad}
    assert gradients[0].keys() == wanted
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3)
    assert not [name for name, gradient in gradients[0].items() if not gradient.any() and "position_emb" not in name]


def test_the_control_has_the_architecture_without_the_weights(pretrained: Path, tmp_path: Path) -> None:
    """Bug: "from scratch" that is not, or that has another network than what it is compared with."""
    before = load_file(pretrained / "checkpoints/last/student.safetensors")
    name = "backbone.fusion.layers.0.qkv.weight"
    taken, scratch = (
        TrainingRun(child("reasoning", pretrained, tmp_path, f"from_scratch={flag}")) for flag in ("false", "true")
    )
    assert torch.equal(taken.task.network.state_dict()[name], before[name])
    assert not torch.equal(scratch.task.network.state_dict()[name], before[name])
    assert scratch.task.network.state_dict().keys() == taken.task.network.state_dict().keys()
    assert (len(taken.ancestry), len(scratch.ancestry)) == (1, 0)
    answer = TrainingRun(child("decoder", pretrained, tmp_path)).task.network.answer
    assert torch.equal(answer.layers[0].cross.qkv.weight, before[name])  # and so does a decoder, with the words' head
    assert torch.equal(answer.words.dense.weight, before["mlm.dense.weight"])
    new = taken.task.network.pair
    assert torch.equal(new.layers[0].qkv.weight, before[name])  # a new head begins from the fusion
    assert not torch.equal(scratch.task.network.pair.layers[0].qkv.weight, scratch.task.network.state_dict()[name])


def test_a_task_without_teacher_can_be_followed_by_one_with(pretrained: Path, tmp_path: Path) -> None:
    """Bug: retrieval after questions begins with a random teacher, or refuses."""
    config = child("decoder", pretrained, tmp_path)
    train(config, is_resume=False)
    run = TrainingRun(child("grounding", Path(config.output_dir), tmp_path))
    teacher = run.task.modules()["teacher"].module.state_dict()
    for name, value in run.task.network.backbone.state_dict().items():
        assert torch.equal(teacher[name], value), name
    stored = load_file(Path(config.output_dir) / "checkpoints/last/student.safetensors")
    assert torch.equal(stored["backbone.image_projection.weight"], teacher["image_projection.weight"])


@pytest.mark.parametrize("kind", ["decoder", "reasoning"])
def test_plan(kind: str, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a plan that only pre-training can print, or that counts one image of a pair."""
    estimate.print_estimate(child(kind, pretrained, tmp_path))
    lines = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert lines["image tokens"] == ("160 (10 a sample)" if kind == "reasoning" else "80 (5 a sample)")
    assert "teacher" not in lines["peak memory, estimated"]


@pytest.mark.parametrize(
    ("kind", "made", "loss"), [("decoder", VqaBatch, "answer"), ("reasoning", ReasoningBatch, "truth")]
)
def test_a_non_finite_loss_can_be_reproduced(kind: str, made: Any, loss: str, pretrained: Path, tmp_path: Path) -> None:
    """Bug: the folder that a failed step leaves lacks what its kind of task needs."""
    config = child(kind, pretrained, tmp_path)
    run = TrainingRun(config)
    with torch.no_grad():
        run.task.network.backbone.fusion.layers[0].fc2.bias[0] = torch.nan
    for name, text in run.task.assets.items():
        Path(config.output_dir).mkdir(exist_ok=True)
        (Path(config.output_dir) / name).write_text(text)
    run.tokenizer.save_pretrained(Path(config.output_dir) / "tokenizer")
    (Path(config.output_dir) / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.raises(NonFiniteLoss, match=f"loss/{loss}") as caught:
        run.loop([]).step(run.example_batch(8), 0)
    (folder,) = (Path(config.output_dir) / "non-finite").iterdir()
    assert str(folder) in str(caught.value)
    batch = made(**checkpoint.read_tensors(folder, "batch"))
    fresh = TrainingRun(load_config(folder / "config.yaml").model_copy(update={"checkpoint": None}))
    checkpoint.load_module(folder, "student", fresh.task.network)
    assert fresh.dry_run_loop("fp32", folder).backward(batch, 0)[1][f"loss/{loss}"].isnan()


@pytest.mark.parametrize("file", sorted(ROOT.glob("tests/fixtures/version_0_1/*/results.json")), ids=str)
def test_the_metrics_of_past_results_can_be_kept_by(file: Path) -> None:
    """Bug: `training.keep_best` refuses a metric that the task has, or takes one that it never has."""
    run = json.loads(file.read_text())["evaluations"][0]
    task = {"cross": "pretrain"}.get(file.parent.name, file.parent.name)
    patterns = task_class(task).metric_patterns
    assert all(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in run["metrics"])
    assert all(not any(fnmatch.fnmatchcase(f"{name}x", p) for p in patterns if "*" not in p) for name in run["metrics"])


def test_the_metric_to_keep_by_has_the_name_of_its_file() -> None:
    """Bug: of several held-out files a metric of the first is kept by, or none is taken."""
    config = config_of(data={"source": "pairs", "train_file": "a", "eval_file": ["b/val.jsonl", "c/test.jsonl"]})
    task: Any = object.__new__(PretrainTask)
    task.config = config
    task.check_metric("test/itc/rsum")
    task.check_metric("items/aro/itc/accuracy")
    wrong = ("test/rerank/i2t_r2", "test/probe/nothing/itm", "test/masked_word/nope")
    for name in (*wrong, "itc/rsum", "tets/itc/rsum", "val/itc/rsun"):
        with pytest.raises(ValueError, match=f"has no metric '{name}'; its metrics: val|test/itc/rsum"):
            task.check_metric(name)


@pytest.mark.parametrize(
    ("loss", "name"),
    [("itm", "rerank/rsum"), ("itc", "itc/rsum"), ("mlm", "masked_word/colour"), ("itm", "items/a/itm/x")],
)
def test_a_metric_of_a_loss_that_is_switched_off_is_not_kept_by(loss: str, name: str) -> None:
    """Bug: the run trains to its first evaluation, which does not measure the metric."""
    task: Any = object.__new__(PretrainTask)
    task.config = config_of(losses={"weights": {loss: 0}})
    with pytest.raises(ValueError, match=f"training.keep_best: {name} is not measured with losses.weights.{loss}: 0"):
        task.check_metric(name)
    task.config = config_of()
    task.check_metric(name)


def test_the_table_names_each_task_with_its_config() -> None:
    """Bug: a config is read with the keys of another task, or a task has no config."""
    assert {name: task_class(name).config_type for name in TASKS} == CONFIG_TYPES


def test_a_mistake_in_a_config_imports_no_network(tmp_path: Path) -> None:
    """Bug: a mistyped key is named after ten seconds of imports."""
    file = write_config(tmp_path / "bad.yaml", {"task": "vqa", "training": {"total_stepz": 3}})
    code = (
        "import sys\nfrom mamo.cli import main\n"
        "try: main(['pretrain', '--config', sys.argv[1]])\n"
        "except SystemExit as end: print(end.code, *{'torch', 'timm', 'transformers', 'numpy'} & {*sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(file)], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["2"]
    assert "training.total_stepz: unknown key" in run.stderr
