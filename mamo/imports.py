"""Import classes and values that a config names by an import path, `module:name`.

Searched are the Python path and, appended to it, the folder of the config file named on the command line. The folder of
a checkpoint or an export is never searched: loading weights runs no code that came with them. For an export, which may
be a stranger's, the current directory is not searched either. A module that is imported already is used in any case.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Class = TypeVar("Class")


_config_folders: set[Path] = set()
"""Folders of config files named on the command line."""
_FOREIGN = "; weights bring no code: import the module before loading them"
_excluded: list[Path] = []
"""Folders of the weights that are being loaded."""


def is_import_path(text: str) -> bool:
    """Say whether a config value names something by its import path, `module:name`."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def add_folder_of(config_file: Path) -> None:
    """Append the folder of a config file to the Python path; loader processes inherit it."""
    folder = str(config_file.resolve().parent)
    _config_folders.add(Path(folder))
    if folder not in sys.path:
        sys.path.append(folder)


@contextlib.contextmanager
def no_code_from(folder: Path, is_foreign: bool = False) -> Iterator[None]:
    """Within the block, import nothing from a folder of weights, even if it is on the Python path.

    Args:
        folder: of the weights.
        is_foreign: import nothing from the current directory either, unless it has the config file of the command line.
    """
    before, folder, here = list(sys.path), folder.resolve(), Path.cwd()
    is_without_here = is_foreign and here not in _config_folders
    places = {entry: Path(entry or ".").resolve() for entry in before}
    sys.path[:] = [
        entry
        for entry, place in places.items()
        if not place.is_relative_to(folder) and not (is_without_here and place == here)
    ]
    _excluded.append(folder)
    try:
        yield
    finally:
        _excluded.pop()
        sys.path[:] = before


def _is_excluded(module_name: str) -> bool:
    """Return whether a module, or a package of it, is new and below a folder of weights.

    A folder without `__init__.py` is a package of the folder around it, which may be on the Python path.
    """
    names = module_name.split(".")
    for part in (".".join(names[:end]) for end in range(1, len(names) + 1) if _excluded):
        spec = None if part in sys.modules else importlib.util.find_spec(part)
        places = [] if spec is None else [*(spec.submodule_search_locations or ())]
        places += [spec.origin] if spec is not None and spec.has_location and spec.origin else []
        if any(Path(place).resolve().is_relative_to(folder) for place in places for folder in _excluded):
            return True
    return False


def import_value(path: str, key: str) -> Any:
    """Import what `module:name` names.

    Args:
        path: the import path.
        key: the config key that holds it, for messages.

    Raises:
        ValueError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    files = _files_of(module_name)
    if len(files) > 1:
        raise ValueError(f"{key}: {path} may be {' or '.join(map(str, files))}; rename one of them")
    try:
        is_excluded = _is_excluded(module_name)
        module = None if is_excluded else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{key}: no module {module_name!r} for {path}; put it next to the config file, or its folder on "
                "PYTHONPATH" + (_FOREIGN if _excluded else "")
            ) from None
        raise ValueError(f"{key}: {module_name} needs the module {error.name!r}, which is not installed") from None
    except Exception as error:
        raise ValueError(f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    if is_excluded:
        raise ValueError(f"{key}: {path} is in the folder of the weights{_FOREIGN}")
    try:
        return getattr(module, name)
    except AttributeError:
        names = [
            found for found, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name
        ]
        raise ValueError(
            f"{key}: {module_name} has no {name!r}; its classes are {', '.join(names) or 'none'}"
        ) from None


def _files_of(module_name: str) -> list[Path]:
    """List the files on the Python path that a module may be of; installed packages are one."""
    top = module_name.partition(".")[0]
    found = [
        file.resolve()
        for entry in sys.path
        for file in (Path(entry or ".", top, "__init__.py"), Path(entry or ".", f"{top}.py"))
        if file.is_file()
    ]
    return list(dict.fromkeys(found))


def import_class(path: str, parent: type[Class], key: str) -> type[Class]:
    """Import a class that extends `parent`.

    Raises:
        ValueError: as `import_value`; it is no class of that kind, or lacks methods.
    """
    found = import_value(path, key)
    if not inspect.isclass(found) or not issubclass(found, parent):
        raise ValueError(f"{key}: {path} is no {parent.__name__}; extend {parent.__module__}.{parent.__name__}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"{key}: {path} lacks {', '.join(missing)} of {parent.__name__}")
    return found


def validate_settings(settings_type: type[BaseModel] | None, values: dict[str, Any], key: str) -> Any:
    """Validate the settings of a named class.

    Args:
        settings_type: the class's `settings_type`; None takes no settings.
        values: from the config.
        key: their config key, for messages.

    Returns:
        An instance of `settings_type`, or None.

    Raises:
        ValueError: one message with every problem.
    """
    if settings_type is None:
        if values:
            raise ValueError(f"{key}.{next(iter(values))}: the class has no settings")
        return None
    try:
        return settings_type.model_validate(values)
    except ValidationError as error:
        lines = [f"{key}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ValueError("\n".join(lines)) from None
