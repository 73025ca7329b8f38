"""Plain values of a configuration, before they are validated: YAML, overrides, one over the other."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, Any]
"""Plain values of a config file, or of another JSON or YAML document, by key."""


class _ScalarError(ValueError):
    """A scalar that YAML takes for a number or a date, and that is none."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-4` is a number and a repeated key is an error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value. Raises ValueError with the line of a number or date that is not valid."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            if isinstance(error, _ScalarError) or not isinstance(node, yaml.ScalarNode):
                raise
            value = f"`{_brief(node.value)}`"
            raise _ScalarError(
                f"line {node.start_mark.line + 1}: {value} is no valid number or date; quote a text"
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: the key `{key}` appears twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_values(path: Path, overrides: Sequence[str] = ()) -> Values:
    """Return the plain values of a YAML file with the overrides applied; raises `ValueError` as `load_config` does."""
    try:
        values = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config file not found: {path}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `section:` keys at the top level")
    for override in overrides:
        apply_override(values, override)
    return values


def apply_override(values: Values, override: str) -> None:
    """Put one `section.key=value`, its value read as YAML, into nested plain values. Raises `ValueError`."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"override `{_brief(override)}`: write section.key=value")
    try:
        value = _load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override `{_brief(override)}`: not valid YAML: {error}") from None
    *sections, leaf = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"override `{_brief(override)}`: `{section}` is not a section")
        values = inner
    values[leaf] = value


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
