"""The reference of the configuration as Markdown, from its types: every key, its type, default, meaning and tasks."""

import ast
import functools
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mamo.config.schema import DEFAULT_TASK, RunConfig, Section
from mamo.config.unused import Types, section_at

BEGIN, END = "<!-- table: keys -->", "<!-- /table -->"


def config_table(types: Types) -> str:
    """Return a Markdown table of all keys, section by section; a key that differs between tasks has several lines."""
    tasks_of: dict[tuple[str, str, str, str], list[str]] = {}
    for task, config_type in types.items():
        for key, field, meaning in _keys(config_type, ""):
            default = "*needed*" if field.is_required() else f"`{_as_yaml(field.default)}`"
            row = _task_row(types) if key == "task" else (key, _type_name(field), default, meaning)
            tasks_of.setdefault(row, []).append(task)
    order = list(dict.fromkeys(key.rpartition(".")[0] for key, *_ in tasks_of))
    lines = ["| key | type | default | meaning | tasks |", "|---|---|---|---|---|"]
    for row in sorted(tasks_of, key=lambda row: order.index(row[0].rpartition(".")[0])):
        key, *rest = row
        tasks = "all" if len(tasks_of[row]) == len(types) else ", ".join(tasks_of[row])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key}`", *rest, tasks)) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str, types: Types) -> str:
    """Return `text` with the table between its markers. Raises ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in this file")
    return f"{before}{BEGIN}\n\n{config_table(types)}\n{END}{after}"


def _task_row(types: Types) -> tuple[str, str, str, str]:
    """Return the one line of `task`, from the first sentences of the config types."""
    tasks = [f"`{task}`: {(inspect.getdoc(config_type) or '').splitlines()[0]}" for task, config_type in types.items()]
    meaning = " ".join([_meaning(RunConfig, "task"), *tasks])
    return "task", " or ".join(f"`{task}`" for task in types), f"`{DEFAULT_TASK}`", meaning


def _keys(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo, str]]:
    for name, field in section.model_fields.items():
        inner = section_at(section, name)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, _meaning(section, name)


def _meaning(section: type[Section], key: str) -> str:
    """Return the string below a key, in the class that declares it last."""
    for owner in section.__mro__:
        if issubclass(owner, Section) and key in _meanings(owner.__module__).get(owner.__name__, {}):
            return _meanings(owner.__module__)[owner.__name__][key]
    return ""


@functools.cache
def _meanings(module: str) -> dict[str, dict[str, str]]:
    """Return the string below each key of a module's classes, by class and key."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(inspect.getfile(sys.modules[module])).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            strings = found.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    strings[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _type_name(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(b, name):g}" for b in field.metadata for name, sign in signs.items() if hasattr(b, name)
    ]
    return " ".join([_name_of(field.annotation), ", ".join(limits)]).strip()


def _name_of(kind: object) -> str:
    if get_origin(kind) is Annotated:
        return _name_of(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Section)):
        return "section"
    if get_origin(kind) is list:
        return f"list of {_name_of(get_args(kind)[0])}"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(_name_of(part) for part in get_args(kind))
    names: dict[object, str] = {
        str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null",
    }  # fmt: skip
    return names[kind]


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
