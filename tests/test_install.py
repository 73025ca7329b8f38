"""The package as others install it: a wheel, and nothing beside it but what it declares."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOL = PYPROJECT["project"], PYPROJECT["tool"]
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}  # PYTHONPATH may lead here
CHECK = """
import importlib, pkgutil, sys, warnings
from pathlib import Path
import mamo
for module in pkgutil.walk_packages(mamo.__path__, "mamo."):
    importlib.import_module(module.name)
from mamo.tasks.registry import load_config
from mamo.cli import main
from mamo.config.shipped import find_config
from mamo.trainer import train
assert load_config(find_config("scenes", "pretrain")).output_dir == "runs/scenes"
train(load_config(Path("tiny.yaml")), is_resume=False)
main(["pretrain", "--config", "tiny.yaml", "--resume"])
model = mamo.load("run")
model.save_pretrained("exported")
assert mamo.load("exported").encode_text(["a red circle"]).equal(model.encode_text(["a red circle"]))
assert (Path(mamo.__file__).parent / "py.typed").is_file()
print("works from", mamo.__file__)
"""


def build_wheel(folder: Path, *options: str) -> Path:
    """Build the wheel of the files that git tracks, in `folder`."""
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in (name for name in listed.stdout.split("\0") if (ROOT / name).is_file()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *options, "-w", str(folder), str(source)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("mamo-*.whl")
    return wheel


def expected_files(source: Path) -> set[str]:
    """Names in the wheel: modules, `py.typed`, shipped networks and configs, and the finished cells of the studies."""
    modules = {str(path.relative_to(source)) for path in (source / "mamo").rglob("*.py")}
    configs = {
        path for folder in ("pretrain", "finetune", "studies") for path in (source / "configs" / folder).glob("*.yaml")
    }
    results = source / "configs/studies/results"
    configs |= {path for pattern in ("*.yaml", "cells.jsonl") for path in results.rglob(pattern)}
    networks = {path for path in (source / "mamo/networks").rglob("*") if path.is_file()}
    own = {str(path.relative_to(source)) for path in networks} | {"mamo/py.typed"}
    return modules | own | {f"mamo/{path.relative_to(source)}" for path in configs}


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees nothing of this one; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def closure(names: list[str]) -> dict[str, Distribution]:
    """What the requirements bring with them, extras left out, by name."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = distribution(requirement.name)
        waiting += [Requirement(text) for text in found[name].requires or []]
    return found


def use(python: Path, folder: Path, tiny: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """Run `CHECK` in `folder` with the environment's own packages alone."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**tiny, "output_dir": "run"}))
    return subprocess.run(
        [str(python), "-c", CHECK], cwd=folder, env=CLEAN, capture_output=True, text=True, timeout=600
    )


def test_the_version_is_in_the_changelog() -> None:
    """Bug: a release without a list of its changes."""
    assert f"\n## {PROJECT['version']}\n" in (ROOT / "mamo/CHANGELOG.md").read_text()


def test_every_package_is_listed() -> None:
    """Bug: pyproject.toml does not list a new package, and the wheel lacks it."""
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mamo").rglob("__init__.py")}
    assert set(TOOL["setuptools"]["packages"]) == packages | {"mamo.configs"}


def test_a_wheel_has_the_command_and_the_configs(tmp_path: Path) -> None:
    """Bug: an installed package knows no config by name, or writes the tables of a study into itself."""
    pytest.importorskip("setuptools", minversion="77")  # else the build needs the index; the slow test below builds so
    site = tmp_path / "site"
    with zipfile.ZipFile(build_wheel(tmp_path, "--no-build-isolation")) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert expected_files(tmp_path / "source") == {name for name in names if name.startswith("mamo/")}
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "mamo = mamo.cli:main" in (site / entry_points).read_text()

    def mamo(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mamo", *words]
        environment = {**CLEAN, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    unknown = mamo("pretrain", "--config", "scnes")
    assert unknown.stderr == "error: config file not found: scnes; shipped configs: scenes, scenes_1h, mlim_scenes\n"
    mistake = mamo("pretrain", "--config", "scenes", "sead=1")
    assert f"error: {site}/mamo/configs/pretrain/scenes.yaml: 1 problem(s)" in mistake.stderr
    printed = mamo("study", "--config", "losses", "--jobs", "0")
    assert printed.stdout.splitlines() == [f"runs/studies/results/losses{suffix}" for suffix in (".csv", ".md")]
    assert not list(site.rglob("losses.md"))


@pytest.mark.slow
def test_a_wheel_works_with_what_it_declares(tmp_path: Path) -> None:
    """Bug: an import of something that only developers have, a module or py.typed left out of the wheel."""
    from tests.tiny import TWO_STEPS, values_of

    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert expected_files(tmp_path / "source") == {name for name in names if name.startswith("mamo/")}
    python = make_environment(tmp_path / "venv")
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    site, ours = Path(where.stdout.strip()), Path(sysconfig.get_paths()["purelib"])
    declared = closure(PROJECT["dependencies"])
    for found in declared.values():
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(ours / top)
    assert not {"pytest", "hypothesis", "ruff", "mypy"} & declared.keys()
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, env=CLEAN)
    done = use(python, tmp_path, values_of(training=TWO_STEPS))
    assert done.returncode == 0, done.stderr
    assert f"works from {site}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_oldest_and_the_newest_torch(tmp_path: Path, which: str) -> None:
    """Bug: a call that the oldest torch that we declare does not have, or the newest has no more (needs the index)."""
    from tests.tiny import TWO_STEPS, values_of

    (torch,) = (text for text in PROJECT["dependencies"] if text.startswith("torch>="))
    (torchvision,) = (text for text in PROJECT["dependencies"] if text.startswith("torchvision>="))
    pins = [text.replace(">=", "==") + ".0" for text in (torch, torchvision)] if which == "oldest" else []
    python = make_environment(tmp_path / "venv")
    install = [str(python), "-m", "pip", "install", "-q", str(build_wheel(tmp_path)), *pins]
    subprocess.run(install, check=True, env=CLEAN)
    done = use(python, tmp_path, values_of(training=TWO_STEPS))
    assert done.returncode == 0, done.stderr
