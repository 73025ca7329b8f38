"""The READMEs: their commands and snippets run, tables are fresh, links resolve, and the first page stays short."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mamo.benchmark.scale import PAPER
from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.questions import build_vqa2
from mamo.data.builders.refcoco import build_refcoco
from mamo.study.report import markdown
from mamo.study.results import read_rows
from mamo.study.spec import read_study
from mamo.study.tables import TABLES, fill, readmes
from mamo.tasks.registry import build_config
from mamo.world.export import Layout, export_scenes
from mamo.world.scene import SceneWorld, Split

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(2400)
"""Some forty commands run before the first of these tests."""
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in readmes(ROOT)}
PARTS = TEXTS[Path("mamo/README.md")].partition("## The parts in a loop of your own\n")[2].partition("\n## ")[0]
"""Its snippets run in test_parts.py."""
SMALL = (
    "training.total_steps=2 training.warmup_steps=0 training.batch_size_global=32 evaluation.enabled=false "
    "training.precision=fp32 data.workers=0"
)


def blocks(language: str) -> list[tuple[str, str]]:
    """List (marker, content) of the fenced blocks of all READMEs; a marker is `<!-- ci: NAME -->` before a block."""
    pattern = rf"^(?:<!-- ci: (\w+) -->\n)?```{language}\n(.*?)^```"
    return [found for text in TEXTS.values() for found in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]


def marked(name: str) -> str:
    """Return the one bash block with this marker."""
    (block,) = (content for marker, content in blocks("bash") if marker == name)
    return block.strip()


def commands() -> list[str]:
    """List each line of the unmarked bash blocks once, comments removed."""
    lines = [
        line.split("  #")[0].strip() for marker, block in blocks("bash") if not marker for line in block.splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line))


LANE = """
import json, shlex, subprocess, sys
from mamo.cli import main

for line, codes in json.load(sys.stdin):
    program, *words = shlex.split(line)
    code = 0
    try:
        if program == "mamo":
            main(words)
        else:
            code = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *words]).returncode
    except SystemExit as end:
        code = end.code or 0
    if code not in codes:
        sys.exit(f"{line}: exit code {code}")
"""
"""Runs commands one after another in one process: an import of PyTorch takes longer than most of them."""


def smallest(line: str) -> tuple[str, tuple[int, ...]]:
    """Return the command at its smallest, and the exit codes it may have."""
    if re.search(r"\b(pretrain|finetune) ", line):
        line = re.sub(r"training\.total_steps=\d+", "", line) + f" {SMALL}"
    if " evaluate " in line:
        line = f"{line} evaluation.retrieval_items=20 evaluation.probe_items=10"
    # two steps may leave the band; 64 questions are not the whole of VQA
    return line, (0, 1) if " compare " in line or " data build " in line else (0,)


def first_failure(lines: list[str], folder: Path) -> str | None:
    """Run the lines in order in `folder`, up to one that fails: return its errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    work = json.dumps([smallest(line) for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", LANE], cwd=folder, env=environment, input=work, capture_output=True, text=True
    )
    return done.stderr[-4000:] if done.returncode else None


def write_records(folder: Path) -> None:
    """Write `questions`, `sentences` and `boxes`, as a user's own files, below `folder`."""
    layouts: tuple[tuple[str, Layout, object], ...] = (
        ("questions", "vqa2", build_vqa2),
        ("sentences", "nlvr2", build_nlvr2),
        ("boxes", "refcoco", build_refcoco),
    )
    splits: tuple[tuple[Split, int], ...] = (("train", 40), ("val", 12))
    for name, layout, build in layouts:
        assert callable(build)
        for split, count in splits:
            release = folder / f"{name}-{split}"
            export_scenes(SceneWorld("easy", 0), split, count, (48, 48), release, layout)
            build(release, folder / name)
        if layout == "nlvr2":
            (folder / name / "dev.jsonl").rename(folder / name / "val.jsonl")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that looks like a clone with a user's files; the commands write into it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    write_records(folder / "data")
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (60, 40), "red").save(folder / name)
    return folder


@pytest.fixture(scope="module")
def runs(clone: Path) -> Path:
    """The clone after all commands."""
    tour = [line for line in commands() if "runs/mine" in line or "data/probes" in line]
    others = [line for line in commands() if line not in tour]
    assert min(len(tour), len(others)) > 3
    with ThreadPoolExecutor(max_workers=2) as lanes:  # neither reads what the other writes
        for failure in lanes.map(lambda lines: first_failure(lines, clone), (tour, others)):
            assert failure is None, failure
    (clone / "runs/scenes").symlink_to("mine")
    return clone


def test_commands_run(runs: Path) -> None:
    """Bug: a README names an option, a file or a key that does not exist."""
    assert (runs / "runs/mine/results.json").exists() or list((runs / "runs/mine/evaluations").iterdir())
    assert (runs / "runs/own/checkpoints").is_dir()


PYTHON = [block for _, block in blocks("python") if block not in PARTS]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_snippets_run(block: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a snippet calls something that has another name or other arguments now."""
    monkeypatch.chdir(runs)
    exec(compile(block, "README.md", "exec"), {"__name__": "snippet"})


def test_ci_finds_its_command() -> None:
    """Bug: CI runs another block than the README's, or a set-up command that cannot be pasted as it is."""
    first, train, test = map(marked, ("first", "train", "test"))
    assert len(first.splitlines()) == len(train.splitlines()) == len(test.splitlines()) == 1
    assert first.endswith("mamo demo --to demo.html")
    assert train.endswith("mamo pretrain --config scenes")
    assert ".[dev]" in test
    assert "pytest" in test.rpartition(" && ")[2]
    extract = re.search(r"^test_command=\$\(.*?README\.md\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE | re.DOTALL)
    assert extract is not None
    script = f'{extract[0]}; echo "$test_command"'
    found = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == test


def test_yaml_snippets_are_valid_config() -> None:
    """Bug: a snippet with a key that the strict config refuses."""
    snippets = blocks("yaml")
    assert snippets
    for _, snippet in snippets:
        build_config({"output_dir": "runs/x", "evaluation": {"enabled": False}, **yaml.safe_load(snippet)}, "README.md")


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_resolve() -> None:
    """Bug: a picture, file or heading that a README links to does not exist."""
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = ROOT / name.parent / path if path else ROOT / name
            assert target.exists(), f"{name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
                assert anchor in map(slug, headings), f"{name}: {link}"


def test_each_folder_is_reachable() -> None:
    """Bug: a README that no other README links to."""
    linked = {
        (name.parent / link.partition("#")[0])
        for name, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", text)
    }
    targets = {(ROOT / path).resolve() for path in linked}
    assert {ROOT / name for name in TEXTS} - targets <= {ROOT / "README.md"}


def test_the_first_page_is_short() -> None:
    """Bug: the README grows until a newcomer finds nothing in it."""
    assert len(README.splitlines()) <= 220
    assert len(README.encode()) <= 16 * 1024


def test_tables_are_fresh() -> None:
    """Bug: a table is older than the results, configs or types it comes from."""
    used = set()
    for name, text in TEXTS.items():
        assert fill(text, ROOT) == text, f"{name}: run python scripts/tables.py"
        used |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert used == TABLES.keys()
    results = ROOT / "configs/studies/results/2026-11"
    for name in ("methods", "losses", "mlim", "mim_target"):
        study = read_study(results / f"{name}.yaml")
        assert (results / f"{name}.md").read_text() == markdown(study, list(study.trials("all")), read_rows(results))


def test_a_new_result_changes_its_table(tmp_path: Path) -> None:
    """Bug: tables pass as fresh whatever the committed results hold."""
    shutil.copytree(ROOT / "configs/reference", tmp_path / "configs/reference")
    results = tmp_path / "configs/reference/scenes/results.json"
    text = results.read_text()
    assert '"rerank/i2t_r1": 88.5' in text
    results.write_text(text.replace('"rerank/i2t_r1": 88.5', '"rerank/i2t_r1": 12.3'))
    assert "re-ranked by ITM | 12.3 | 99.9 | 0.1 |" in fill(README, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: speed -->\nno end\n", "no <!-- /table -->"),
        ("<!-- table: sped -->\n<!-- /table -->\n", "'sped' is unknown"),
    ],
)
def test_a_table_that_cannot_be_filled_is_named(text: str, message: str) -> None:
    """Bug: a mistyped marker leaves a table empty in silence."""
    with pytest.raises(ValueError, match=message):
        fill(text, ROOT)


def test_every_key_has_a_meaning() -> None:
    """Bug: a key without the string below it, or a type or default that a reader cannot use."""
    table = TABLES["keys"](ROOT)
    assert "| `training.batch_size_global` | whole number ≥ 1 | `64` | Samples an optimizer step sees," in table
    assert "| `output_dir` | text | *needed* |" in table
    assert "| `teacher.momentum` | number ≥ 0, ≤ 1 | `0.995` |" in table
    assert "| `data.image_size_px` | whole number or list of whole number | `48` |" in table
    assert "|  |" not in table


def test_the_scale_plan_is_of_the_papers_config() -> None:
    """Bug: hours of another recipe than the one that `paper.yaml` states."""
    training = yaml.safe_load((ROOT / "configs/pretrain/paper.yaml").read_text())["training"]
    assert training["total_steps"] * training["batch_size_global"] == PAPER.pairs
