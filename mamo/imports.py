"""Import classes and values that a config names by an import path, `module:name`.

Searched are the Python path and, appended to it, the folder of the config file named on the command line. The folder of
a checkpoint or an export is never searched: loading weights runs no code that came with them.
"""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Class = TypeVar("Class")


def is_import_path(text: str) -> bool:
    """Say whether a config value names something by its import path, `module:name`."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def add_folder_of(config_file: Path) -> None:
    """Append the folder of a config file to the Python path; loader processes inherit it."""
    folder = str(config_file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


@contextlib.contextmanager
def no_code_from(folder: Path) -> Iterator[None]:
    """Within the block, import nothing from a folder of weights, even if it is on the Python path."""
    before, folder = list(sys.path), folder.resolve()
    sys.path[:] = [entry for entry in before if not Path(entry or ".").resolve().is_relative_to(folder)]
    try:
        yield
    finally:
        sys.path[:] = before


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
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{key}: no module {module_name!r} for {path}; put it next to the config file, or its folder on "
                "PYTHONPATH"
            ) from None
        raise ValueError(f"{key}: {module_name} needs the module {error.name!r}, which is not installed") from None
    except Exception as error:
        raise ValueError(f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
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
