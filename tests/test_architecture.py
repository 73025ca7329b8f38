"""The shape of the code base: imports point one way, small functions and files, safe loading, no network at import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "mamo").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
TIERS = {
    "scripts": 6, "loading": 5, "api": 4, "benchmark": 4, "gallery": 3, "tasks": 3, "training": 3, "study": 3, "cli": 3,
    "models": 2, "losses": 2, "data": 2, "evaluation": 2, "masking": 2, "queue": 2, "teacher": 2, "explain": 2,
    "config_reference": 2, "config": 1, "contradictions": 1, "distributed": 1, "hub": 1, "presets": 1, "values": 1,
}  # fmt: skip
NEVER = {  # among rooms of one tier
    "models": {"losses", "data", "evaluation", "masking", "queue", "teacher"},
    "losses": {"models", "data", "evaluation", "masking", "queue", "teacher"},
    "data": {"models", "losses", "evaluation", "queue", "teacher"},
    "evaluation": {"losses", "queue", "teacher"},
    "training": {"tasks"},
}


def room(path: Path) -> str:
    """The part of the project that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    return "scripts" if parts[0] == "scripts" else parts[1].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """The rooms of `mamo` that a file imports, wherever in it."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("mamo."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """Bug: a model imports a task, a loss imports a network: the parts can no longer be used or read alone."""
    own = room(path)
    if own == "__init__":
        allowed = {"api", "loading"} if path.parent.name == "mamo" else set()  # where the package's own names are
        assert set(imports(ast.parse(path.read_text()))) <= allowed
        return
    for other in imports(ast.parse(path.read_text())):
        assert TIERS[other] <= TIERS[own], f"{own} imports {other}"
        assert other not in NEVER.get(own, set()), f"{own} imports {other}"
        assert other != "cli" or own == "scripts"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    """Bug: a function or file that no one can hold in mind."""
    text = path.read_text()
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            assert node.end_lineno - first + 1 < 80, f"{node.name} has {node.end_lineno - first + 1} lines"


def calls(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.Call, str]]:
    """(dotted name, call, the innermost function around it) of every call."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node, inside
        yield from calls(node, node.name if isinstance(node, ast.FunctionDef) else inside)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_loading_is_safe_and_output_goes_through_logging(path: Path) -> None:
    """Bug: a downloaded checkpoint runs code; a library that prints into the output of whoever uses it."""
    for name, call, inside in calls(ast.parse(path.read_text())):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True"
        assert name not in ("pickle.load", "pickle.loads", "np.load", "numpy.load", "eval", "exec", "yaml.unsafe_load")
        if name == "yaml.load":
            assert options.get("Loader") in ("yaml.SafeLoader", "_Loader")  # the latter is a SafeLoader
        if name == "print" and room(path) != "scripts":
            # what answers a person at the terminal: messages on stderr, and functions that say so by their name
            assert options.get("file") == "sys.stderr" or inside.startswith("print_"), f"print in {inside}"


def test_the_scan_sees_violations(tmp_path: Path) -> None:
    """Bug: the tests above pass since their scan finds nothing."""
    tree = ast.parse("def f():\n    from mamo.tasks import x\n    import mamo.losses.itc\n    print(torch.load('x'))\n")
    assert list(imports(tree)) == ["tasks", "losses"]
    assert [(name, inside) for name, _, inside in calls(tree)] == [("print", "f"), ("torch.load", "f")]
    assert len(SOURCES) > 40


def test_importing_needs_no_network() -> None:
    """Bug: a module that fetches weights, a tokenizer or a version number when it is imported."""
    code = """
import importlib, pkgutil, socket
def refuse(*arguments, **options):
    raise AssertionError("network at import")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import mamo
names = [m.name for m in pkgutil.walk_packages(mamo.__path__, "mamo.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
