"""Keys that only other tasks use: drop their defaults, refuse other values, complete a config by them."""

from collections.abc import Iterable, Mapping
from typing import Any

from mamo.config.presets import PRESETS
from mamo.config.schema import RunConfig, Section
from mamo.config.values import merge

Values = dict[str, Any]
Types = Mapping[str, type[RunConfig]]
"""Task -> its config type."""


def section_at(section: type[Section], key: str) -> type[Section] | None:
    """Return the type of the section `key` of a section; None for a plain value or an unknown key."""
    field = section.model_fields.get(key)
    inner = None if field is None else field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def preset_of(model: object) -> str:
    """Return the preset that a file's `model` names; `tiny` where it names none."""
    preset = model.get("preset", "tiny") if isinstance(model, dict) else "tiny"
    return preset if preset in PRESETS else "tiny"


def restrict(values: Values, section: type[Section]) -> Values:
    """Return the values whose keys the section has."""
    found = {}
    for key, value in values.items():
        if key in section.model_fields:
            inner = section_at(section, key)
            found[key] = restrict(value, inner) if inner is not None and isinstance(value, dict) else value
    return found


def defaults(section: type[Section]) -> Values:
    """Return the default of every key that has one."""
    found = {}
    for name, field in section.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[name] = value.model_dump(mode="json") if isinstance(value, Section) else value
    return found


def all_defaults(types: Iterable[type[RunConfig]]) -> Values:
    """Return the default of every key of all tasks; the first task that has a key decides."""
    found: Values = {}
    for config_type in types:
        found = merge(defaults(config_type), found)
    return found


def drop_unused(values: Values, task: str, config_type: type[RunConfig], types: Types) -> tuple[Values, list[str]]:
    """Drop the keys that only other tasks have.

    Args:
        values: of a file.
        task, config_type: the file's.
        types: all known ones.

    Returns:
        The values without those keys, and one line for each that does not hold the value at which it changes nothing:
        its default, for `model` the preset's value, for the weight of a loss 0.
    """
    reference = merge(all_defaults(types.values()), {"model": PRESETS[preset_of(values.get("model"))]})
    lines: list[str] = []

    def kept(values: Values, section: type[Section], reference: Values, path: tuple[str, ...]) -> Values:
        found = {}
        for key, value in values.items():
            if key not in section.model_fields and key in reference:
                unused = reference[key] if section.unused is None else section.unused
                if not _holds(value, unused):
                    users = [name for name, other in types.items() if _has(other, (*path, key))]
                    only = f" (only by {', '.join(users)})" if path else ""
                    lines.append(f"{'.'.join((*path, key))}: not used by task {task}{only}; remove it")
                continue
            inner = section_at(section, key)
            if inner is not None and isinstance(value, dict):
                value = kept(value, inner, reference.get(key, {}), (*path, key))
            found[key] = value
        return found

    return kept(values, config_type, reference, ()), lines


def complete(config: RunConfig, types: Types) -> Values:
    """Return the config's values, and for each key that only other tasks have the value at which it changes nothing."""
    reference = merge(all_defaults(types.values()), {"model": PRESETS[config.model.preset]})

    def filled(values: Values, section: type[Section], reference: Values) -> Values:
        found = dict(values)
        for key, value in reference.items():
            inner = section_at(section, key)
            if key not in section.model_fields:
                found[key] = value if section.unused is None else section.unused
            elif inner is not None:
                found[key] = filled(found[key], inner, value)
        return found

    return filled(config.model_dump(mode="json"), type(config), reference)


def non_defaults(config: RunConfig, types: Types) -> Values:
    """Return what `complete` gives without what is at its default (`all_defaults`).

    The result does not change when a key moves from one task's type to another's, nor when a new key has its default.
    """
    return _difference(complete(config, types), all_defaults([*types.values(), type(config)]))


def _difference(values: Values, defaults: Values) -> Values:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            inner = _difference(value, defaults[key])
            if inner:
                found[key] = inner
        elif key not in defaults or value != defaults[key]:
            found[key] = value
    return found


def _holds(value: object, unused: object) -> bool:
    """Say whether a value, or each value of a section, is the unused one."""
    if isinstance(value, dict) and isinstance(unused, dict):
        return all(key in unused and _holds(inner, unused[key]) for key, inner in value.items())
    return bool(value == unused)


def _has(config_type: type[RunConfig], path: tuple[str, ...]) -> bool:
    section: type[Section] | None = config_type
    for part in path[:-1]:
        section = None if section is None else section_at(section, part)
    return section is not None and path[-1] in section.model_fields
