"""Fine-grained sets through the commands: protocols, the table of all sets, and scoring during training."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mamo.commands import data, evaluate
from mamo.config.schema import RunConfig
from mamo.data.items import read_items
from mamo.evaluation.fine_grained import SETS, absent_lines, find_set, table_lines
from mamo.evaluation.protocols import PROTOCOLS
from mamo.tasks.pretrain import items as pretrain_items
from mamo.trainer import train
from tests.tiny import TWO_STEPS, config_of

CUT = Path(__file__).parents[1] / "fixtures" / "fine_grained"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cuts of SugarCrepe and VSR, built, with pictures; one of VSR's is missing."""
    root = tmp_path_factory.mktemp("data")
    release = root / "release"
    names = {
        e["filename"] for file in (CUT / "sugarcrepe").glob("*.json") for e in json.loads(file.read_text()).values()
    }
    rows = [json.loads(line) for line in (CUT / "vsr_test.jsonl").read_text().splitlines()]
    (release / "images").mkdir(parents=True)
    for number, name in enumerate(sorted(names | {row["image"] for row in rows[1:]})):
        pixels = np.random.default_rng(number).integers(0, 256, (18, 22, 3), np.uint8)
        Image.fromarray(pixels).save(release / "images" / name)
    (release / "data").symlink_to(CUT / "sugarcrepe")
    (release / "random_test.jsonl").symlink_to(CUT / "vsr_test.jsonl")
    for name in ("sugarcrepe", "vsr"):
        assert data.main(["build", name, "--from", str(release), "--to", str(root / name)]) == 1
    return root


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    evaluate.main(words)
    return capsys.readouterr().out.splitlines()


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["evaluations"]


def test_all_sets_of_a_folder_in_one_table(
    root: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a set that lies there is left out, one whose images are missing is counted as whole, or nothing is said of
    the sets that do not lie there."""
    out = tmp_path / "out"
    words = [f"checkpoint={pretrained}", f"output_dir={out}", f"data.root={root}"]
    lines = run([*words, "protocol=fine-grained", "--pictures"], capsys)
    rows = [line.split() for line in lines[1:] if line.startswith(("sugarcrepe ", "vsr-random-test "))]
    assert [row[:3] for row in rows] == [
        *(["sugarcrepe", score, metric] for score in ("itm", "itc", "itm+itc") for metric in ("accuracy", "macro")),
        ["vsr-random-test", "itm", "accuracy"],
    ]
    assert rows[-1][-7:] == ["7/8", "0", "57.30", "49.70", "63.00", "-", "-"]
    assert "28/28" in rows[0]
    assert any("was trained on: scenes" in line for line in lines)
    absent = lines[lines.index("not scored:") + 1 :]
    assert len(absent) == len(SETS) - 3  # ARO's relations are one line
    assert f"mamo data build winoground --from RELEASE --to {root}/winoground" in "".join(absent)
    entries = {entry["protocol"]: entry for entry in entries_of(out)}
    assert set(entries) == {
        "sugarcrepe-itm-custom", "sugarcrepe-itc-custom", "sugarcrepe-itm+itc-custom", "vsr-random-test-itm-custom"
    }  # fmt: skip
    vsr = entries["vsr-random-test-itm-custom"]
    file = root / "vsr" / "vsr-random-test.jsonl"
    described = vsr["items"]["vsr-random-test"]
    assert (described["items"], described["scored"], described["sha256"]) == (8, 7, read_items(file).sha256)
    assert (described["weights"], described["ties"], vsr["precision"]) == ("float32", "wrong", "fp32")
    assert vsr["facts"]["items/vsr-random-test/missing_images"] == 1
    page = (out / "report.html").read_text()
    for name in ("sugarcrepe", "vsr-random-test"):
        assert f"<h2>Fine-grained items: {name}</h2>" in page
    assert page.count("<img ") >= 10
    run([*words, "protocol=fine-grained"], capsys)
    assert len(entries_of(out)) == 4  # replaced
    (alone,) = entries_of(one(words, root, tmp_path, capsys))
    whole = entries["sugarcrepe-itm-custom"]
    assert (alone["protocol"], alone["metrics"], alone["items"]) == (
        whole["protocol"],
        whole["metrics"],
        whole["items"],
    )


def one(words: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Evaluate SugarCrepe by its own protocol; returns the folder."""
    words = [word.replace(str(tmp_path / "out"), str(tmp_path / "one")) for word in words]
    lines = run([*words, "protocol=sugarcrepe-itm"], capsys)
    assert lines[0].startswith("sugarcrepe-itm-custom (test) of")
    return tmp_path / "one"


def test_scores_are_judged_as_written(root: Path, pretrained: Path, tmp_path: Path) -> None:
    """Bug: the file of the scores of each item belongs to other items than the metrics."""
    evaluate.main(
        [f"checkpoint={pretrained}", "protocol=sugarcrepe-itm", f"data.root={root}", f"output_dir={tmp_path}"]
    )
    (entry,) = entries_of(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "items-sugarcrepe.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [item.id for item in read_items(root / "sugarcrepe/sugarcrepe.jsonl").items]
    right = [row["scores"]["itm"][0][0] > row["scores"]["itm"][0][1] for row in rows]
    assert entry["metrics"]["items/sugarcrepe/itm/accuracy"] == pytest.approx(100 * np.mean(right))


def test_names_of_other_inputs(root: Path, pretrained: Path, tmp_path: Path) -> None:
    """Bug: another text length, or bf16, goes by the protocol's plain name; an override that nothing reads is taken."""
    own = tmp_path / "own.jsonl"
    row = {"images": [str(root / "release/images" / os.listdir(root / "release/images")[0])], "group": "g", "id": "1"}
    own.write_text(json.dumps({**row, "texts": ["a red circle", "a blue square"], "right": [[0, 0]]}) + "\n")
    words = [f"checkpoint={pretrained}", f"output_dir={tmp_path / 'out'}", f"evaluation.items_files={own}"]
    for extra in ([], ["data.text_max_tokens=5"], ["training.precision=bf16"]):
        evaluate.main([*words, "protocol=items-itm", *extra])
    assert [entry["protocol"] for entry in entries_of(tmp_path / "out")] == [
        "items-itm", "items-itm-custom", "items-itm-custom"
    ]  # fmt: skip
    for more, message in (
        (
            ["protocol=items-itm", f"data.eval_file={own}"],
            "data.eval_file: not read under items-itm; name the items by",
        ),
        (["protocol=pairs-zeroshot"], "evaluation.items_files: not read under pairs-zeroshot; use a protocol of items"),
        (["protocol=items-itm", f"data.root={root}"], "data.root: not read under items-itm"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main([*words, *more])
    with pytest.raises(ValueError, match=r"evaluation\.items_files: needed under items-itc; name one or several files"):
        evaluate.main([*words[:2], "protocol=items-itc"])
    with pytest.raises(ValueError, match=r"data\.root: .*none contains no published set, such as .*mamo data build"):
        evaluate.main([*words[:2], "protocol=fine-grained", f"data.root={tmp_path / 'none'}"])
    with pytest.raises(ValueError, match=r"winoground\.jsonl: cannot be read: .*; winoground: huggingface\.co"):
        evaluate.main([*words[:2], "protocol=winoground-itm", f"data.root={root}"])


def test_items_are_scored_in_training_in_fp32(
    root: Path, tmp_path: Path, no_curves: None, fails: Callable[..., str]
) -> None:
    """Bug: a bf16 run scores in bf16, where scores tie; the run's other numbers change; a mistake is met at the end."""
    items = [str(root / "sugarcrepe/sugarcrepe.jsonl"), str(root / "vsr/vsr-random-test.jsonl")]
    few = {"enabled": True, "retrieval_items": 6, "probe_items": 4, "rerank_k": 2}

    def config(name: str, **evaluation: Any) -> RunConfig:
        training = {**TWO_STEPS, "precision": "bf16"}
        return config_of(output_dir=str(tmp_path / name), training=training, evaluation={**few, **evaluation})

    train(config("plain"), is_resume=False)
    train(config("items", items_files=items), is_resume=False)
    plain, found = entries_of(tmp_path / "plain"), entries_of(tmp_path / "items")
    assert plain[0]["metrics"] == {k: v for k, v in found[0]["metrics"].items() if not k.startswith("items/")}
    assert plain[0]["facts"] == {k: v for k, v in found[0]["facts"].items() if not k.startswith("items/")}
    assert plain[0]["protocol"] == found[0]["protocol"]
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "items/metrics.jsonl").read_bytes()
    later = tmp_path / "later"
    evaluate.main(
        [f"checkpoint={tmp_path / 'items'}", "protocol=fine-grained", f"data.root={root}", f"output_dir={later}"]
    )
    expected = {name: value for entry in entries_of(later) for name, value in entry["metrics"].items()}
    assert {k: v for k, v in found[0]["metrics"].items() if k.startswith("items/")} == expected
    assert found[0]["items"]["sugarcrepe"]["weights"] == "float32"
    page = (tmp_path / "items/report.html").read_text()
    assert "Fine-grained items: sugarcrepe" in page
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"images": ["a.jpg"]}\n')
    message = fails(lambda: train(config("broken", items_files=[str(broken)]), is_resume=False))
    assert f"{broken}:1: field 'texts' is missing" in message
    assert not (tmp_path / "broken/metrics.jsonl").exists()


def test_macro_counts_attribute_pairs_from_25_items_on(
    tmp_path: Path, root: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: ARO's attribution is a mean over all attribute pairs."""
    image = str(next((root / "release/images").iterdir()))
    row = {"images": [image], "texts": ["a red circle", "a blue square"], "right": [[0, 0]]}
    groups = ["large"] * 25 + ["small"] * 24
    lines = [json.dumps({**row, "group": group, "id": str(k)}) for k, group in enumerate(groups)]
    (tmp_path / "aro-attribution.jsonl").write_text("\n".join(lines))
    seen = []
    evaluate_items = pretrain_items.evaluate_items

    def watch(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return evaluate_items(*arguments)

    monkeypatch.setattr(pretrain_items, "evaluate_items", watch)
    file = f"evaluation.items_files={tmp_path / 'aro-attribution.jsonl'}"
    evaluate.main([f"checkpoint={pretrained}", "protocol=aro-attribution-itm", file, f"output_dir={tmp_path / 'out'}"])
    assert seen == [25]
    (entry,) = entries_of(tmp_path / "out")
    assert entry["protocol"] == "aro-attribution-itm-custom"


def test_the_table_of_sets_is_whole(root: Path, tmp_path: Path) -> None:
    """Bug: a set without protocol or builder, a published number of a metric that is not printed."""
    builders = {"sugarcrepe", *data.BUILDERS}
    for name, fixed in SETS.items():
        assert fixed.builder in builders
        assert all(f"{name}-{score}" in PROTOCOLS for score in fixed.scores)
        for (_, score), numbers in (fixed.published or {}).items():
            assert score in fixed.scores
            assert set(numbers) <= {*fixed.metrics}
    assert find_set(root, "sugarcrepe") == root / "sugarcrepe/sugarcrepe.jsonl"
    assert len(absent_lines(tmp_path)) == len(SETS) - 1
    assert table_lines([])[0].startswith("set")


def test_items_need_a_task_that_scores_them() -> None:
    """Bug: the key is taken by a task that never reads it, or two files share the names of their metrics."""
    with pytest.raises(ValueError, match=r"evaluation\.items_files: not scored by task vqa; remove it"):
        config_of("vqa", evaluation={"items_files": ["a.jsonl"]})
    with pytest.raises(ValueError, match=r"items_files: two files have the name a, by which their metrics are named"):
        config_of(evaluation={"items_files": ["x/a.jsonl", "y/a.jsonl"]})
    with pytest.raises(ValueError, match="items_scores: is empty"):
        config_of(evaluation={"items_scores": []})
    assert config_of(evaluation={"items_files": "a.jsonl"}).evaluation.items_files == ["a.jsonl"]
    assert torch.get_default_dtype() == torch.float32


def test_exported_probes_have_the_probes_numbers(pretrained: Path, tmp_path: Path) -> None:
    """Bug: the probes of the embedded world and items are scored by two rules, or the export shows other scenes."""
    words = ["--split", "test", "--image-size-px", "16", "--count", "12", "--to", str(tmp_path / "probes")]
    assert data.main(["export", "scenes", "--layout", "items", *words]) == 0
    few = ["evaluation.probe_items=12", "evaluation.retrieval_items=2"]
    evaluate.main(
        [f"checkpoint={pretrained}", "protocol=scenes-easy-zeroshot", *few, f"output_dir={tmp_path / 'scenes'}"]
    )
    items = f"evaluation.items_files={tmp_path / 'probes/items.jsonl'}"
    for score in ("itm", "itc"):
        out = tmp_path / score
        evaluate.main([f"checkpoint={pretrained}", f"protocol=items-{score}", items, f"output_dir={out}"])
        (entry,), (probed,) = entries_of(out), entries_of(tmp_path / "scenes")
        assert entry["facts"][f"items/items/ties/{score}"] == 0
        found = {k.rpartition("/")[2]: v for k, v in entry["metrics"].items() if "/by/" in k}
        expected = {
            k.split("/")[1]: v for k, v in probed["metrics"].items() if k.startswith("probe/") and k.endswith(score)
        }
        assert found == pytest.approx(expected)
