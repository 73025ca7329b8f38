"""Several held-out files: each with metrics, facts and a table of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mamo.evaluator import evaluate
from mamo.tasks.registry import build_config
from mamo.trainer import train
from tests.tiny import TWO_STEPS, values_of

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "grey")


def write_pairs(folder: Path, name: str, n: int, background: int) -> str:
    folder.mkdir(exist_ok=True)
    lines = []
    for k in range(n):
        Image.new("RGB", (16, 16), (30 * k, background, 7 * k)).save(folder / f"{name}{k}.png")
        lines.append(json.dumps({"image": f"{name}{k}.png", "caption": f"a {COLOURS[k]} circle"}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder / f"{name}.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("files")
    data = {
        "source": "pairs",
        "train_file": write_pairs(folder, "train", 8, 0),
        "eval_file": [write_pairs(folder, "near", 6, 90), write_pairs(folder, "far", 4, 200)],
    }
    values = values_of(
        data=data, output_dir=str(folder / "run"), training=TWO_STEPS,
        evaluation={"enabled": True, "rerank_k": 2, "rankings_depth": 2, "repeated_captions": "separate"},
    )  # fmt: skip
    train(build_config(values), is_resume=False)
    return folder / "run", values


def test_each_file_has_the_numbers_of_its_own_evaluation(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Bug: the second file is scored against the first one's gallery, or one overwrites the other's numbers."""
    folder, values = run
    (entry,) = json.loads((folder / "results.json").read_text())["evaluations"]
    assert entry["eval_file"] == values["data"]["eval_file"]
    assert {name.partition("/")[0] for name in entry["metrics"]} == {"near", "far"}
    assert (entry["facts"]["near/gallery_images"], entry["facts"]["far/gallery_images"]) == (6, 4)
    for file in values["data"]["eval_file"]:
        name = Path(file).stem
        single = evaluate(folder, "pairs-zeroshot", [f"data.eval_file={file}", "evaluation.rerank_k=2",
                          "evaluation.repeated_captions=separate"], tmp_path / name)  # fmt: skip
        own = {key.removeprefix(f"{name}/"): v for key, v in entry["metrics"].items() if key.startswith(f"{name}/")}
        assert own == pytest.approx(single["metrics"])
        assert (folder / name / "rankings.jsonl").is_file()


def test_the_report_has_a_table_for_each(run: tuple[Path, dict[str, Any]]) -> None:
    """Bug: one long table in which the rows of two files alternate."""
    page = (run[0] / "report.html").read_text()
    near, far = page.index("<h3>near</h3>"), page.index("<h3>far</h3>")
    assert near < page.index("itc/i2t_r1", near) < far < page.index("itc/i2t_r1", far)


def test_no_file_may_be_one_that_was_trained_on(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Bug: only the first of several held-out files is compared with the training files."""
    folder, values = run
    files = json.dumps([values["data"]["eval_file"][0], values["data"]["train_file"]])
    with pytest.raises(ValueError, match=r"train\.jsonl has the content of the training file"):
        evaluate(folder, "pairs-zeroshot", [f"data.eval_file={files}"], tmp_path)
