"""Plain values of a configuration, before they are validated: YAML, overrides, one over the other."""

import os
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, Any]
"""Plain values of a config file, or of another JSON or YAML document, by key."""


_SURPRISING = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-9_.]+)+)")
"""Numbers that YAML 1.1 reads in base 8 or 60."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class _ScalarError(ValueError):
    """A scalar that YAML takes for a number or a date, and that is none."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-4` is a number, and a repeated key, `010` and `1:30` are errors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value. Raises ValueError with the line of a number or date that is not valid."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int | float) and _SURPRISING.fullmatch(str(node.value)):
                raise _ScalarError(
                    f"line {node.start_mark.line + 1}: `{_brief(node.value)}` would be the number "
                    f"{_brief(str(value))}; write that, or quote a text"
                )
            return value
        except ValueError as error:
            if isinstance(error, _ScalarError) or not isinstance(node, yaml.ScalarNode):
                raise
            raise _ScalarError(
                f"line {node.start_mark.line + 1}: `{_brief(node.value)}` is no valid number or date; quote a text"
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, times in Counter(key for key in keys if isinstance(key, Hashable)).items():
            if times > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: the key `{_brief(str(key))}` appears twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{_brief(str(error.problem))}") from None


def read_values(path: Path, overrides: Sequence[str] = ()) -> Values:
    """Return the plain values of a YAML file with the overrides applied; raises `ValueError` as `load_config` does."""
    try:
        values = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config file not found: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (at byte {error.start}); convert it to UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `section:` keys at the top level")
    for override in overrides:
        apply_override(values, override)
    return values


def apply_override(values: Values, override: str) -> None:
    """Put one `section.key=value`, its value read as YAML, into nested plain values.

    Raises:
        ValueError: it is malformed, has no value, or contains a comment or a line break, which YAML would drop.
    """
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        hint = "; a config file is passed as --config FILE" if key.endswith((".yaml", ".yml")) else ""
        raise ValueError(f"override `{_brief(override)}`: write section.key=value{hint}")
    if not text.strip():
        raise ValueError(f"override `{_brief(override)}`: has no value; write {key}=null for none, or leave it out")
    try:
        value = _load(text)
        has_comment = _has_comment(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override `{_brief(override)}`: not valid YAML: {error}") from None
    if has_comment or "\n" in text:
        what = "` #` begins a comment" if has_comment else "a line break is not kept"
        raise ValueError(f"override `{_brief(override)}`: {what} in YAML; quote the value: '{key}=\"...\"'")
    *sections, leaf = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"override `{_brief(override)}`: `{section}` is not a section")
        values = inner
    values[leaf] = value


def _has_comment(text: str) -> bool:
    """Return whether YAML drops a part of the text."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = max(end, token.end_mark.index)
    return False


def expand_path(text: str) -> str:
    """Return a path with a leading `~` and `$NAME` or `${NAME}` replaced.

    Raises:
        ValueError: it is empty, or there is no such user or variable.
    """
    if not text.strip():
        raise ValueError("give a path, or leave the key out")
    if os.path.lexists(text):
        return text

    def look_up(found: re.Match[str]) -> str:
        value = os.environ.get(found[1] or found[2])
        if not value:
            raise ValueError(f"the environment variable {found[0]} is not set")
        return value

    expanded = os.path.expanduser(_VARIABLE.sub(look_up, text))
    if expanded.startswith("~"):
        raise ValueError("there is no such user; write ./~ for a folder of this name")
    return expanded


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def merge(base: Values, over: Values) -> Values:
    """Return `base` with the values of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def flatten(values: Values, prefix: str = "") -> Values:
    """Return the values by dotted key."""
    flat: Values = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
