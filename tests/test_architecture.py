"""The shape of the code base: imports point one way, small functions and files, safe loading, no network at import."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "mamo").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
ROOMS = re.findall(
    r"^\d+\. (.*)$",
    (ROOT / "mamo/README.md").read_text("utf-8").partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0],
    re.MULTILINE,
)
"""Lines of the order of rooms in `mamo/README.md`, from the top."""
TIER = {room: -number for number, line in enumerate(ROOMS) for room in re.findall(r"`(\w+)`", line)}
FRONT = {"entry", "inference"}
"""Rooms of the names that `mamo/__init__.py` hands out."""


def room(path: Path) -> str:
    """Return the part of the project that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    return "scripts" if parts[0] == "scripts" else parts[1].removesuffix(".py")


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from walk(node)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the rooms of `mamo` that a file imports, wherever in it."""
    for node in walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("mamo."))


def test_every_room_has_its_line() -> None:
    """Bug: a new room that the order does not know, or one that is gone."""
    assert set(TIER) == {room(path) for path in SOURCES} - {"__init__"}


def test_imports_point_one_way() -> None:
    """Bug: a model imports a task, a loss imports a network: the parts can no longer be used or read alone."""
    for path in SOURCES:
        own, found = room(path), set(imports(ast.parse(path.read_text())))
        if own == "__init__":
            assert found <= FRONT
        for other in found - {own} if own != "__init__" else ():
            assert TIER[other] < TIER[own], f"{path}: {own} imports {other}"


def test_files_and_functions_are_small() -> None:
    """Bug: a function or file that no one can hold in mind."""
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                assert node.end_lineno is not None
                assert node.end_lineno - first + 1 < 80, f"{path}: {node.name} has {node.end_lineno - first + 1} lines"


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Bug: `mamo.train` is a module or a function, depending on what was imported before."""
    for path in SOURCES:
        names = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        }
        assert path.stem not in names, path
    assert not {path.stem for path in SOURCES if path.parent.name == "mamo"} & {"train", "build", "load"}


OPENING = re.compile(r"(What|Which|How|Where)\b")
UNPLAIN = re.compile(r"\b(told|tells of|is no file|are none|take it out)\b")


def test_docstrings_and_messages_are_plain() -> None:
    """Bug: a docstring that begins with a question word, or a message in words that the field does not use."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                assert not OPENING.match(text), f"{path}: {text.splitlines()[0]}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in MESSAGES:
                words = " ".join(
                    part.value
                    for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
                assert not UNPLAIN.search(words), f"{path}: {words}"


MESSAGES = ("ValueError", "BadSampleError", "CheckpointError", "OSError", "info", "warning")


MISTAKES = ("ValueError", "OSError", "CheckpointError", "DeviceError", "MissingHeadError", "TokenizerMismatchError")
"""Errors of a user's mistake; `BadSampleError` and `JsonError` get the picture or file from a caller."""
NAMED = re.compile(r"`[^`]+`|\b[a-z_]+\.[a-z_]+\b|--[a-z]+|^\w+: |^give ")
COMPLETED_TEXTS = (
    "nested too deeply", "there is no such user", "the .json member must be an object", "its content is not what was",
    "a table has no", "no values to take the mean of",
)  # fmt: skip
"""Starts of texts to which a caller adds the file or key."""


def test_messages_name_what_they_are_about() -> None:
    """Bug: "not valid JSON", of a file that nobody can find: a message without a name, key, argument or value in it."""
    n_messages = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            name, text = ast.unparse(node.exc.func).split(".")[-1], node.exc.args[0]
            if name not in MISTAKES or not isinstance(text, ast.Constant) or not isinstance(text.value, str):
                continue
            n_messages += 1
            assert NAMED.search(text.value) or text.value.startswith(COMPLETED_TEXTS), f"{path}: {text.value}"
    assert n_messages > 5


def calls(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.Call, str]]:
    """(dotted name, call, the innermost function around it) of every call."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node, inside
        yield from calls(node, node.name if isinstance(node, ast.FunctionDef) else inside)


def test_loading_is_safe_and_output_goes_through_logging() -> None:
    """Bug: a downloaded checkpoint runs code; a library that prints into the output of whoever uses it."""
    for path in SOURCES:
        check_calls(path)


def check_calls(path: Path) -> None:
    """Refuse unsafe loading and stray output in a file."""
    for name, call, inside in calls(ast.parse(path.read_text())):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True"
        assert name not in ("pickle.load", "pickle.loads", "np.load", "numpy.load", "eval", "exec", "yaml.unsafe_load")
        if name == "yaml.load":
            assert options.get("Loader") in ("yaml.SafeLoader", "_Loader")  # the latter is a SafeLoader
        if name == "print" and room(path) not in ("scripts", "commands"):
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
