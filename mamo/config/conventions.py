"""Conventions that belong to weights: the pixels and texts they were trained on, and the score they are read by.

A run that starts from weights takes their conventions over, unless its own file sets a key.
"""

from collections.abc import Mapping

from pydantic import BaseModel

from mamo.config.schema import RunConfig
from mamo.config.values import Values, flatten

ALBEF: Mapping[str, object] = {
    "model.image.pixel_statistics": "clip",
    "model.image.resizing": "pillow",
    "model.text.sep": False,
    "model.text.cleaning": "albef",
    "evaluation.itm_score": "match",
    "evaluation.heat_resize": "uncut",
}
"""Those of the public ALBEF implementation and its checkpoints, by key."""
EVALUATED = tuple(key.partition(".")[2] for key in ALBEF if key.startswith("evaluation."))
"""Keys of `evaluation` among them."""


def conventions_of(config: RunConfig) -> dict[str, object]:
    """Return the conventions of a config, by key; without those that its task does not have."""
    flat = flatten(config.model_dump())
    return {key: flat[key] for key in ALBEF if key in flat}


def with_conventions(config: RunConfig, conventions: Mapping[str, object]) -> tuple[RunConfig, dict[str, object]]:
    """Set the keys that the config's own file leaves open.

    Returns:
        The config, and the conventions that its own values contradict.
    """
    own = conventions_of(config)
    differing = {key: value for key, value in conventions.items() if key in own and own[key] != value}
    contradicted = {key: value for key, value in differing.items() if _is_set(config, key)}
    opened = {key: value for key, value in differing.items() if key not in contradicted}
    if not opened:
        return config, contradicted
    values: Values = config.model_dump()
    for key, value in opened.items():
        *sections, leaf = key.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[leaf] = value
    return type(config).model_validate(values), contradicted


def _is_set(config: RunConfig, key: str) -> bool:
    """Return whether the values that the config was built from have the key."""
    section: BaseModel = config
    *sections, leaf = key.split(".")
    for name in sections:
        if name not in section.model_fields_set:
            return False
        section = getattr(section, name)
    return leaf in section.model_fields_set
