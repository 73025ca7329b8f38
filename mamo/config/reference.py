"""The reference of the configuration as Markdown, from its types: every key, its type, default and meaning."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mamo.config import schema as module
from mamo.config.schema import Config, Section

BEGIN, END = "<!-- table: keys -->", "<!-- /table -->"


def config_table() -> str:
    """A Markdown table of all keys, in the order of the sections."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field, meaning in _keys(Config, ""):
        default = "*needed*" if field.is_required() else f"`{_as_yaml(field.default)}`"
        cells = [f"`{key}`", _type_name(field), default, meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """`text` with the table between its markers. Raises ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in this file")
    return f"{before}{BEGIN}\n\n{config_table()}\n{END}{after}"


def _keys(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo, str]]:
    meanings = _meanings()[section.__name__]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, meanings.get(name, "")


def _meanings() -> dict[str, dict[str, str]]:
    """The string below each key, by class and key."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(inspect.getfile(module)).read_text("utf-8")).body:
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


def _name_of(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _name_of(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_name_of(get_args(kind)[0])}"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(_name_of(part) for part in get_args(kind))
    return {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}[kind]


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
