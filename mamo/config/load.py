"""Load a config: YAML file, `section.key=value` overrides, validation."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mamo.config.presets import PRESETS
from mamo.config.schema import Config, Section
from mamo.config.values import merge, read_values


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `section.key=value` overrides, validate.

    Raises:
        ValueError: one message that lists every problem, each with its dotted path and, for an unknown key, the nearest
            valid one.
    """
    return build_config(read_values(path, overrides), str(path))


def build_config(values: dict[str, Any], origin: str = "config") -> Config:
    """Validate plain values; fills `model` from its preset first. Raises `ValueError` as `load_config` does."""
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("preset", "tiny"), str):
        preset = PRESETS.get(model.get("preset", "tiny"), {})
        values = {**values, "model": merge(preset, model)}
    elif model is None:
        values = {**values, "model": dict(PRESETS["tiny"])}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in explain(problem, Config)]
        raise ValueError(f"{origin}: {len(lines)} problem(s)\n  " + "\n  ".join(lines)) from None


def explain(problem: Any, root: type[Section]) -> list[str]:
    """The lines that tell a person of one of pydantic's problems with a value of the section `root`."""
    path = [str(part) for part in problem["loc"] if part not in ("int", "list[constrained-int]")]
    dotted = ".".join(path)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys_of(path[:-1], root), n=1)
        return [f"{dotted}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "")]
    if problem["type"] == "missing":
        return [f"{dotted}: missing"]
    message = problem["msg"].removeprefix("Value error, ")
    return [f"{dotted}: {message} (found {problem['input']!r})"] if path else str(message).split("\n")


def _keys_of(path: list[str], root: type[Section]) -> list[str]:
    section: Any = root
    for part in path:
        section = getattr(getattr(section, "model_fields", {}).get(part), "annotation", Section)
    return list(getattr(section, "model_fields", {}))
