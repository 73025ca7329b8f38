"""Load a config: YAML file, `section.key=value` overrides, validation by the config type of its task."""

import difflib
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mamo.config.presets import PRESETS
from mamo.config.schema import DEFAULT_TASK, ModelConfig, RunConfig, Section
from mamo.config.unused import Types, drop_unused, preset_of, restrict, section_at
from mamo.config.values import Values, merge, read_values

PROBLEMS_SHOWN = 40
ConfigTypeOf = Callable[[str], type[RunConfig]]
"""Name or import path of a task -> its config type. Raises ValueError for a task that there is not."""
BuildConfig = Callable[[Values, str], RunConfig]
"""(plain values, their origin) -> config; `build_config` for the tasks of a program."""


def load_config(path: Path, overrides: Sequence[str], config_type_of: ConfigTypeOf, types: Types) -> RunConfig:
    """Read `path`, apply `section.key=value` overrides, validate; see `build_config`."""
    return build_config(read_values(path, overrides), str(path), config_type_of, types)


def build_config(values: Values, origin: str, config_type_of: ConfigTypeOf, types: Types) -> RunConfig:
    """Validate plain values. Fills `model` from its preset first.

    Args:
        values: sections and keys.
        origin: names `values` in messages.
        config_type_of: finds the config type of the task that `values` name.
        types: config types of all known tasks. A key that only others have is dropped at its default.

    Raises:
        ValueError: one message that lists every problem, each with its dotted path and, for an unknown key, the nearest
            valid one.
    """
    task = values.get("task", DEFAULT_TASK)
    if not isinstance(task, str):
        raise _refusal(origin, [f"task: give the name of a task (found {task!r})"])
    try:
        config_type = config_type_of(task)
    except ValueError as error:
        raise _refusal(origin, [str(error)]) from None
    values, lines = drop_unused({**values, "task": task}, task, config_type, types)
    values["model"] = _with_preset(values.get("model", {}), section_at(config_type, "model") or ModelConfig)
    try:
        config = config_type.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        lines += [line for problem in problems[:PROBLEMS_SHOWN] for line in explain(problem, config_type)]
        lines += [""] * len(problems[PROBLEMS_SHOWN:])
    if lines:
        raise _refusal(origin, lines)
    return config


def explain(problem: Any, root: type[Section]) -> list[str]:
    """Return the lines of a message for one of pydantic's problems with a value of the section `root`."""
    if problem["loc"] and str(problem["loc"][-1]).startswith("literal["):  # the other half of "a number or auto"
        return []
    kinds = ("int", "constrained-int", "list[constrained-int]")
    path = [str(part) for part in problem["loc"] if part not in kinds]
    dotted = ".".join(path)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys_of(path[:-1], root), n=1) or _elsewhere(path[-1], root)
        return [f"{dotted}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "")]
    if problem["type"] == "missing":
        return [f"{dotted}: missing"]
    if problem["type"] in ("model_type", "model_attributes_type"):
        return [f"{dotted}: expected keys and values, as a section has (found {reprlib.repr(problem['input'])})"]
    message = problem["msg"].removeprefix("Value error, ")
    return [f"{dotted}: {message} (found {reprlib.repr(problem['input'])})"] if path else str(message).split("\n")


def _with_preset(model: Any, section: type[Section]) -> Any:
    """Fill `model` from its preset; a preset that there is not is left to the validation."""
    if model is not None and not (isinstance(model, dict) and model.get("preset", "tiny") in PRESETS):
        return model
    return merge(restrict(PRESETS[preset_of(model)], section), model or {})


def _keys_of(path: list[str], root: type[Section]) -> list[str]:
    section: Any = root
    for part in path:
        section = getattr(getattr(section, "model_fields", {}).get(part), "annotation", Section)
    return list(getattr(section, "model_fields", {}))


def _elsewhere(key: str, root: type[Section]) -> list[str]:
    """Return the dotted keys of other sections that end in `key`."""
    sections = [(name, _keys_of([name], root)) for name in root.model_fields]
    return [f"{name}.{key}" for name, keys in sections if key in keys]


def _refusal(origin: str, lines: list[str]) -> ValueError:
    shown = [line if len(line) <= 500 else f"{line[:500]}..." for line in lines[:PROBLEMS_SHOWN]]
    if len(lines) > PROBLEMS_SHOWN:
        shown.append(f"and {len(lines) - PROBLEMS_SHOWN:,} more")
    return ValueError(f"{origin}: {len(lines)} problem(s)\n  " + "\n  ".join(shown))
