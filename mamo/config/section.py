"""The base of all sections of a config, the types of their values, and the section `logging`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from mamo.config.values import expand_path

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]
Settings = dict[str, Any]
"""Settings of a class from outside, which validates them itself."""


class Section(BaseModel):
    """A strict section: unknown keys, booleans for numbers, numbers for text, infinity and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    unused: ClassVar[float | None] = None
    """Value at which a key that only other tasks have changes nothing here; None: its default."""

    def problems(self) -> Iterator[str]:
        """Yield `key: what is wrong` for each contradiction between the keys of this section."""
        yield from ()

    def all_problems(self) -> Iterator[str]:
        """Yield the problems of this section and of those inside it, with dotted keys."""
        yield from self.problems()
        for name in type(self).model_fields:
            inner = getattr(self, name)
            if isinstance(inner, Section):
                yield from (f"{name}.{problem}" for problem in inner.all_problems())


def expanded_paths(value: str | list[str] | None) -> str | list[str] | None:
    """Expand one path or several; see `expand_path`."""
    if isinstance(value, list):
        return [expand_path(path) for path in value]
    return None if value is None else expand_path(value)


def repeated_stems(files: list[str]) -> Iterator[str]:
    """Yield a line for each name, without its ending, that several files have."""
    stems = [Path(path).stem for path in files]
    for stem in sorted({stem for stem in stems if stems.count(stem) > 1}):
        yield f"two files have the name {stem}, by which their metrics are named; rename one"


class LoggingConfig(Section):
    """Receivers of each step's metrics besides the files of the run."""

    trackers: list[str] = ["tensorboard"]
    """`tensorboard`, `wandb`, or `module:Class`, a class from outside, called with folder, config and first step."""
    project: str = "mamo"
    """Project of Weights & Biases."""
