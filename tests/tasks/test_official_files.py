"""The way of a user's data: official files, built into records, trained on, evaluated; and what is refused on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.questions import build_vqa2
from mamo.data.builders.refcoco import build_refcoco
from mamo.data.builders.snli_ve import build_snli_ve
from mamo.data.images import BadSampleError
from mamo.evaluator import evaluate
from mamo.tasks.registry import finetune_config
from mamo.trainer import train
from mamo.world.export import export_scenes
from mamo.world.scene import SceneWorld

pytestmark = pytest.mark.usefixtures("no_curves")
TASKS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "vqa": (build_vqa2, "vqa2", "val", {"vqa": {"answer_min_count": 1}}),
    "reasoning": (build_nlvr2, "nlvr2", "dev", {}),
    "entailment": (build_snli_ve, "snli_ve", "dev", {}),
    "grounding": (
        build_refcoco,
        "refcoco",
        "val",
        {"losses": {"weights": {"mlm": 0, "mim": 0, "mrm_image": 0, "mrm_text": 0}, "itm_pool_size": 4}},
    ),
}
MAIN = {"vqa": "vqa/accuracy", "reasoning": "reasoning/consistency", "grounding": "grounding/proposal",
        "entailment": "text_only/accuracy"}  # fmt: skip


def built(task: str, folder: Path) -> tuple[Path, Path]:
    """Training and evaluation records of a few exported scenes."""
    build, layout, split, _ = TASKS[task]
    for part in ("train", "val"):
        release = folder / part
        export_scenes(SceneWorld("easy", 0), part, 8, (16, 24), release, layout)  # not square, not the network's size
        build(release, folder / f"{part}-records")
    return folder / "train-records/train.jsonl", folder / f"val-records/{split}.jsonl"


def files_config(task: str, train_file: Path, eval_file: Path, folder: Path, pretrained: Path) -> Any:
    values = {
        "task": task,
        "output_dir": str(folder / "run"),
        "data": {"source": "records", "train_file": [str(train_file)], "eval_file": str(eval_file), "workers": 0},
        "training": {
            "total_steps": 1, "checkpoint_every_steps": 1, "warmup_steps": 1, "batch_size_global": 8,
            "precision": "fp32", "device": "cpu",
        },
        "evaluation": {"batch_size": 3, "rerank_k": 3},
        **TASKS[task][3],
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(values))
    return finetune_config(folder / "task.yaml", [f"checkpoint={pretrained}"], is_resume=False)


@pytest.mark.parametrize("task", TASKS)
def test_from_official_files_to_numbers(task: str, pretrained: Path, tmp_path: Path) -> None:
    """Bug: a record's image not found from another folder, boxes of another size, a protocol that needs scenes."""
    train_file, eval_file = built(task, tmp_path)
    config = files_config(task, train_file, eval_file, tmp_path, pretrained)
    train(config, is_resume=False)
    (entry,) = json.loads((tmp_path / "run/results.json").read_text())["evaluations"]
    open_setting = {"vqa": "-k3", "grounding": "-fusion"}.get(task, "")
    assert entry["protocol"] == f"records-{task}{open_setting}"
    assert MAIN[task] in entry["metrics"]
    overrides = ["evaluation.batch_size=5", f"data.eval_file={eval_file}"]
    later = evaluate(tmp_path / "run", f"records-{task}", overrides)
    assert (later["protocol"], later["metrics"]) == (entry["protocol"], entry["metrics"])
    if task == "vqa":
        with pytest.raises(ValueError, match=r"questions are in the training data too, the first is question_id"):
            evaluate(tmp_path / "run", "records-vqa", [overrides[0], f"data.eval_file={train_file}"])
    elif task == "entailment":
        with pytest.raises(ValueError, match=r"8 sentences are about images of the training data, the first is"):
            evaluate(tmp_path / "run", "records-entailment", [overrides[0], f"data.eval_file={train_file}"])
    else:
        with pytest.raises(ValueError, match=r"eval_file: .*train\.jsonl has the content of the training file"):
            evaluate(tmp_path / "run", f"records-{task}", [overrides[0], f"data.eval_file={train_file}"])
    image = next((tmp_path / "val").rglob("*.jpg" if task != "reasoning" else "*.png"))
    image.unlink()
    with pytest.raises(BadSampleError, match=rf"(question_id|identifier|expression_id|pair_id) .*{image.name}"):
        evaluate(tmp_path / "run", f"records-{task}", overrides)


def test_training_on_what_is_evaluated_is_refused(pretrained: Path, tmp_path: Path) -> None:
    """Bug: a validation accuracy of questions that were trained on."""
    train_file, _ = built("vqa", tmp_path)
    config = files_config("vqa", train_file, train_file, tmp_path, pretrained)
    with pytest.raises(ValueError, match=r"train\.jsonl: 8 questions are in the training data too"):
        train(config, is_resume=False)
