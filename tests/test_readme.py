"""Every command in the README runs: the second block is what CI calls, the others run here at their smallest."""

import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mamo.benchmark.scale import PAPER, Links, run_hours, step_seconds
from mamo.config.reference import config_table, with_table
from mamo.config.values import flatten
from mamo.study.pipeline import ROWS, table_of
from mamo.study.published import published_table
from mamo.study.report import markdown
from mamo.study.results import read_rows
from mamo.study.spec import read_study
from mamo.tasks.registry import CONFIG_TYPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = README.partition("## Use the parts\n")[2].partition("\n## ")[0]
"""Its snippets run in test_parts.py."""
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SMALL = "training.total_steps=2 training.warmup_steps=0 training.batch_size_global=32 evaluation.enabled=false"


def commands() -> list[str]:
    """The lines of all bash blocks but the two that set up a virtual environment, comments removed."""
    lines = [line.split("  #")[0].strip() for block in BLOCKS[2:] for line in block.splitlines()]
    return [line for line in lines if line]


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *words = shlex.split(line)
    start = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[program]
    words = [sys.executable, *start, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def first_that_fails(lines: list[str], folder: Path) -> str | None:
    """Run the lines one after another, at their smallest, up to one that fails: that line and what it said."""
    for line in lines:
        small = line
        if "pretrain.py" in line or "finetune.py" in line:
            small = re.sub(r"training\.total_steps=\d+", "", line) + f" {SMALL}"
        if "evaluate.py" in line:
            small = f"{line} evaluation.retrieval_items=20 evaluation.probe_items=10"
        done = run(small, folder)
        # two steps may or may not be inside the band; 64 questions are not the whole of VQA
        fine = (0, 1) if "compare.py" in line or "data.py build" in line else (0,)
        if done.returncode not in fine:
            return f"{small}\n{done.stderr}"
    return None


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that looks like a clone and takes what the commands write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_commands_run(clone: Path) -> None:
    """Bug: the README names an option, a file or a key that is not there any more."""
    tour = [line for line in commands() if "runs/mine" in line]
    others = [line for line in commands() if "runs/mine" not in line]
    assert min(len(tour), len(others)) > 3
    with ThreadPoolExecutor(max_workers=2) as side_by_side:  # the two need nothing of each other
        for wrong in side_by_side.map(lambda lines: first_that_fails(lines, clone), (tour, others)):
            assert wrong is None, wrong
    (clone / "runs/scenes").symlink_to("mine")
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40), "red").save(clone / name)
    for block in re.findall(r"^```python\n(.*?)^```", README.replace(PARTS, ""), re.MULTILINE | re.DOTALL):
        done = run(f"python -c {shlex.quote(block)}", clone)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_first_blocks_are_one_line_each() -> None:
    """Bug: a set-up command that cannot be pasted as it is, or that CI does not run."""
    first, second = BLOCKS[:2]
    assert len(first.strip().splitlines()) == len(second.strip().splitlines()) == 1
    assert "scripts/pretrain.py --config configs/pretrain/scenes.yaml" in first
    assert ".[dev]" in second
    assert "pytest" in second


def test_yaml_snippets_are_valid_config() -> None:
    """Bug: a snippet with a key that the strict config refuses."""
    from mamo.tasks.registry import build_config

    snippets = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert snippets
    for snippet in snippets:
        values = {"output_dir": "runs/x", "evaluation": {"enabled": False}, **yaml.safe_load(snippet)}
        build_config(values, "README.md")


def test_links_resolve() -> None:
    """Bug: a picture or file that the README shows is not in the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_numbers_are_those_of_the_committed_runs() -> None:
    """Bug: a number in the README that no run wrote."""
    rows = re.findall(r"^\| `([\w/]+)` \| (\S+) \| \S+ \| (\S+) \| \S+ \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for column, run in ((1, "scenes"), (2, "scenes_1h")):
        (evaluation,) = json.loads((ROOT / f"configs/reference/{run}/results.json").read_text())["evaluations"]
        for row in rows:
            expected = evaluation["metrics"].get(row[0])
            assert row[column] == ("—" if expected is None else f"{expected:.1f}"), (run, row[0])


def test_the_table_of_optimizers_is_that_of_their_runs() -> None:
    """Bug: an optimizer is praised for numbers that no run wrote, or a run that did badly is left out."""
    files = sorted((ROOT / "configs/reference/scenes/optimizers").glob("*.json"))
    assert len(files) == 6
    for file in files:
        (evaluation,) = json.loads(file.read_text())["evaluations"]
        names = ("rerank/i2t_r1", "rerank/t2i_r1", "probe/attribute_swap/itm")
        image, text, swap = (f"{evaluation['metrics'][name]:.1f}" for name in names)
        assert f"({file.relative_to(ROOT)}) | {image} / {text} | {swap} |" in README


def test_the_tables_of_tasks_and_speed_are_those_of_their_files() -> None:
    """Bug: a number typed by hand, or one that a newer file no longer holds."""
    assert table_of(json.loads((ROOT / "configs/reference/chain/results.json").read_text()), ROWS) in README
    nlvr = sorted((ROOT / "configs/reference/nlvr").glob("*.json"))
    assert len(nlvr) == 4
    for file in nlvr:
        (evaluation,) = json.loads(file.read_text())["evaluations"]
        kind = "statements" if file.name == "results.json" else "reasoning"
        right, low, high = (
            evaluation["metrics"][f"{kind}/{key}"] for key in ("accuracy", "interval_low", "interval_high")
        )
        assert f"({file.relative_to(ROOT)}) | {right:.1f} | {low:.1f} to {high:.1f} |" in README
        assert f"{evaluation['metrics'][f'{kind}/majority']:.1f} %" in README
    speed = json.loads((ROOT / "configs/reference/benchmark/tiny.json").read_text())
    saved = (
        speed[f"shortcuts/tiny/{way}/speedup"] for way in ("clean_encodings", "last_layer_restriction", "visible_only")
    )
    equivalents = (speed[f"step/tiny/{kind}/gflop_equivalents_per_image"] for kind in ("bf16", "fp32"))
    memory = (speed[f"memory/tiny/{key}_mib"] for key in ("predicted", "peak"))
    for shown in (
        f"| {100 * speed['step/tiny/bf16/share_of_matrix_rate']:.0f} % |",
        f"| {' / '.join(f'{value:.1f}' for value in equivalents)} GFLOP |",
        f"| {speed['reranking/tiny/mflop_equivalents_per_pair']:.0f} MFLOP |",
        f"| {speed['step/tiny/albef/gflop_equivalents_per_image']:.1f} GFLOP |",
        f"| {speed['reranking/tiny/albef/mflop_equivalents_per_pair']:.0f} MFLOP |",
        f"| {speed['reranking/tiny/speedup_over_encoding_again']:.1f} × |",
        f"| {speed['loading/jpeg_folder_samples_per_core_s']:.0f} |",
        f"| {', '.join(f'{value:.2f}' for value in saved)} × |",
        f"| {', '.join(f'{value:.0f}' for value in memory)} MiB |",
        f"| {speed['growth/tiny/processes_2/over_one_process']:.2f} × |",
    ):
        assert shown in README
    small = json.loads((ROOT / "configs/reference/benchmark/small_without_amx.json").read_text())
    other = json.loads((ROOT / "configs/reference/benchmark/tiny_without_amx.json").read_text())
    for shown in (
        f"takes {100 * other['step/tiny/fp32/share_of_matrix_rate']:.0f} % of the matrix rate",
        f"but {other['step/tiny/fp32/gflop_equivalents_per_image']:.1f} GFLOP equivalents",
        f"re-ranking {other['reranking/tiny/mflop_equivalents_per_pair']:.0f} MFLOP",
        f"by cross-attention {other['reranking/tiny/albef/mflop_equivalents_per_pair']:.0f}:",
        f"saves {other['shortcuts/tiny/padding_removal/speedup']:.2f} ×",
        f"losses equal to {other['shortcuts/tiny/padding_removal/loss_difference']:.0e}",
        f"takes {100 * small['step/small/fp32/share_of_matrix_rate']:.0f} % of the matrix rate",
        f"re-ranking {100 * small['reranking/small/share_of_matrix_rate']:.0f} %",
        f"says {small['memory/small/predicted_mib']:,.0f} MiB",
        f"takes {small['memory/small/peak_mib']:,.0f}.",
    ):
        assert shown in README
    told = " ".join(README.split())
    for shown in faster_products():
        assert shown in told


def faster_products() -> list[str]:
    """What the README says of the machine whose products are faster, from its three files."""
    tiny, small, base = (
        json.loads((ROOT / f"configs/reference/benchmark/{name}.json").read_text())
        for name in ("tiny_faster_products", "small", "base")
    )
    bf16, fp32, albef = (tiny[f"step/tiny/{kind}/gflop_equivalents_per_image"] for kind in ("bf16", "fp32", "albef"))
    ours, cross = (tiny[f"reranking/tiny/{kind}mflop_equivalents_per_pair"] for kind in ("", "albef/"))
    trimmed = [tiny["shortcuts/tiny/padding_removal/speedup"], small["shortcuts/small/padding_removal/speedup"]]
    memory = [base[f"memory/base/{key}_mib"] for key in ("predicted", "peak")]
    loaded = [found["loading/jpeg_folder_samples_per_core_s"] for found in (tiny, small)]
    return [
        f"fp32 at {1000 * tiny['step/tiny/fp32/matrix_tflop_per_s']:.0f} GFLOP/s",
        f"({tiny['step/tiny/bf16/step_s']:.2f} s in bf16",
        f"): {100 * tiny['step/tiny/bf16/share_of_matrix_rate']:.0f} % in bf16, where the bar is 55 %",
        f"{bf16:.1f} / {fp32:.1f} GFLOP equivalents an image, {albef:.1f} of the ALBEF config",
        f"re-ranking {ours:.0f} MFLOP, by cross-attention {cross:.0f} (aim 51), both",
        f"takes {100 * small['step/small/bf16/share_of_matrix_rate']:.0f} % of the matrix rate at its own shapes and "
        f"{small['step/small/bf16/over_albef']:.2f} times",
        f"re-ranking {small['reranking/small/over_albef']:.2f} times (bar 1.9)",
        f"by cross-attention {small['reranking/small/albef/over_albef']:.2f} times (bar a third)",
        f"in fp32 takes {small['step/small/albef/over_albef']:.2f} times (bar 0.8: missed)",
        f"takes {100 * base['step/base/bf16/share_of_matrix_rate']:.0f} % and "
        f"{base['step/base/bf16/over_albef']:.2f} times (bar 1.25)",
        f"the ALBEF config {base['step/base/albef/over_albef']:.2f} times (bar 0.8: missed)",
        f"says {memory[0]:,.0f} MiB where the process takes {memory[1]:,.0f}.",
        f"saves {trimmed[0]:.2f} × at `tiny` and nothing at `small` ({trimmed[1]:.2f} ×)",
        f"loads {loaded[0]:.0f} JPEGs a second in the one run and {loaded[1]:.0f} in the other (bar 400)",
    ]


def test_the_scale_plan_is_that_of_its_formula() -> None:
    """Bug: hours typed by hand, of another recipe, or of another count of operations."""
    base = json.loads((ROOT / "configs/reference/benchmark/base.json").read_text())
    pair_s = base["step/base/bf16/gflop_per_image"] / 445e3
    assert (
        f"{1000 * pair_s:.2f} ms are the {base['step/base/bf16/gflop_per_image']:.0f} GFLOP of a pair at 445" in README
    )
    for n, name in ((1, "1 GPU"), (8, "8 GPUs"), (64, "64 GPUs")):
        step_s, hours = (work(PAPER, pair_s, n, Links()) for work in (step_seconds, run_hours))
        assert re.search(rf"^\| {name} \| .* \| {step_s:.3f} \| {hours:.3g} \|", README, re.MULTILINE), name
    cpu_s = 1 / base["step/base/bf16/samples_per_s"]
    step_s, hours = step_seconds(PAPER, cpu_s, 1, Links()), run_hours(PAPER, cpu_s, 1, Links())
    assert f"| {cpu_s:.2f} s, measured ([base.json](configs/reference/benchmark/base.json)) | {step_s:.0f} |" in README
    assert f"| {hours:,.0f} | |" in README
    assert f"20 bytes a parameter, {20 * PAPER.parameters / 1e9:.1f} GB" in README
    paper = yaml.safe_load((ROOT / "configs/pretrain/paper.yaml").read_text())["training"]
    assert paper["total_steps"] * paper["batch_size_global"] == PAPER.pairs


def test_the_table_of_what_was_reproduced_is_that_of_the_finished_cells() -> None:
    """Bug: a table that is older than its cells, or one from which a study that failed was left out."""
    results = ROOT / "configs/studies/results"
    table = published_table(ROOT / "configs/studies/published.yaml", results)
    assert table in README
    found = ""
    for name in ("methods", "losses", "mlim", "mim_target"):
        study = read_study(ROOT / f"configs/studies/{name}.yaml")
        report = markdown(study, list(study.cells("all")), read_rows(results))
        assert (results / f"{name}.md").read_text() == report
        found += report
    (prose,) = re.findall(r"^## What we could reproduce\n(.*?)^\|", README, re.MULTILINE | re.DOTALL)
    told = re.findall(r"[+-]\d+\.\d\s\[[+-]\d+\.\d,\s[+-]\d+\.\d\]", prose)
    assert len(told) >= 4
    assert all(" ".join(interval.split()) in found for interval in told)

    def measured(study: str, variant: str, metric: str) -> list[float]:
        """The value of each confirming seed (of `mlim`, which has one set of seeds: of each)."""
        with (results / f"{study}.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["variant"] == variant and row["metric"] == metric]
        return [float(row["value"]) for row in rows if study == "mlim" or row["seed_set"] == "confirm"]

    swap = "probe/attribute_swap/itm"
    rivals = ("albef, equal compute", "mamo", "itc+itm+mlm, equal compute")
    albef, mamo, without_mim = (f"{statistics.mean(measured('methods', rival, swap)):.1f}" for rival in rivals)
    told_once = " ".join(prose.split())
    assert f"equal compute ({albef}; MAMO {mamo}, which is" in told_once
    assert f"ITC + ITM + MLM {without_mim})" in told_once
    steady = measured("mlim", "mlim", "matching/pr_auc/both")
    assert f"({min(steady):.1f} to {max(steady):.1f})" in told_once


def test_the_reference_of_the_keys_is_that_of_the_types() -> None:
    """Bug: a key that was added, renamed or given another default, and the table says the old one."""
    assert with_table(README, CONFIG_TYPES) == README, "run: python scripts/keys.py --write README.md"
    assert "| `training.batch_size_global` | whole number ≥ 1 | `64` | Samples an optimizer step sees," in README
    assert "| `output_dir` | text | *needed* |" in README
    assert "| `teacher.momentum` | number ≥ 0, ≤ 1 | `0.995` |" in README
    assert "| `data.image_size_px` | whole number or list of whole number | `48` |" in README
    lines = config_table(CONFIG_TYPES).splitlines()[2:]
    keys = {path for kind in CONFIG_TYPES.values() for path in flatten(kind(output_dir="x").model_dump())}
    assert {line.split("`")[1] for line in lines} >= keys
    tasks = {line.split("`")[1]: line.split(" | ")[-1].removesuffix(" |") for line in lines}
    assert tasks["training.total_steps"] == "all"
    assert tasks["teacher.momentum"] == "pretrain, grounding"
    assert tasks["vqa.head"] == "vqa"
    assert [line.split(" | ")[1] for line in lines if "| `masking.mode` |" in line] == [
        "`alternate` or `joint`", "`modality_aware`"
    ]  # fmt: skip
    assert "|  |" not in config_table(CONFIG_TYPES), "a key without the string below it that says what it means"
    with pytest.raises(ValueError, match="no <!-- keys"):
        with_table("# another file", CONFIG_TYPES)


def test_own_data_takes_eight_commands() -> None:
    """Bug: the promise of the section is not what it lists."""
    block = README.partition("in eight commands")[2].partition("```bash\n")[2].partition("```")[0]
    assert len(block.strip().splitlines()) == 8
