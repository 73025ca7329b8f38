"""The table of tasks, and classes named by an import path.

A task's module is imported when the task is used: its libraries take ten seconds to import, and a mistake in a config
is found without them.
"""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mamo.config import load
from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.imports import import_class, is_import_path, no_code_from
from mamo.tasks.entailment.config import EntailmentConfig
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.mlim.config import MatchingConfig, MlimConfig
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.reasoning.config import ReasoningConfig
from mamo.tasks.vqa.config import VqaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mamo.tasks.base import Task

TASKS = {
    "pretrain": "mamo.tasks.pretrain.task:PretrainTask",
    "grounding": "mamo.tasks.grounding.task:GroundingTask",
    "vqa": "mamo.tasks.vqa.task:VqaTask",
    "reasoning": "mamo.tasks.reasoning.task:ReasoningTask",
    "entailment": "mamo.tasks.entailment.task:EntailmentTask",
    "mlim": "mamo.tasks.mlim.pretrain:MlimTask",
    "matching": "mamo.tasks.mlim.matching:MatchingTask",
}
CONFIG_TYPES: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "grounding": GroundingConfig,
    "vqa": VqaConfig,
    "reasoning": ReasoningConfig,
    "entailment": EntailmentConfig,
    "mlim": MlimConfig,
    "matching": MatchingConfig,
}
"""The `config_type` of each."""


def task_class(name: str) -> "type[Task]":
    """Return the task of the table, or the class that an import path `module:Class` names.

    Raises:
        ValueError: there is none.
    """
    if name in TASKS:
        module, _, found = TASKS[name].partition(":")
        return cast("type[Task]", getattr(importlib.import_module(module), found))
    if is_import_path(name):
        from mamo.tasks.base import Task

        return import_class(name, Task, "task")  # type: ignore[type-abstract]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(TASKS)}"
    raise ValueError(f"task: unknown task {name!r}; {hint}")


def build_task(config: RunConfig, tokenizer: "PreTrainedTokenizerFast", stored: Path | None = None) -> "Task":
    """Build the task that the config names; see `Task` for the arguments."""
    return task_class(config.task)(config, tokenizer, stored)


def is_same_network(one: str, other: str) -> bool:
    """Say whether two tasks have the same network, so that a checkpoint of one can be evaluated as the other."""
    first, second = task_class(one), task_class(other)
    return issubclass(first, second) or issubclass(second, first)


# ---- configs of these tasks -----------------------------------------------------------------------------------------


def config_type_of(task: str) -> type[RunConfig]:
    """Return the config type of a task. Raises ValueError as `task_class`."""
    return CONFIG_TYPES[task] if task in CONFIG_TYPES else task_class(task).config_type


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply `section.key=value` overrides; see `mamo.config.load.build_config`."""
    return load.load_config(path, overrides, config_type_of, CONFIG_TYPES)


def load_stored_config(folder: Path) -> RunConfig:
    """Read the config of a checkpoint; a class that it names is never imported from the checkpoint's folder."""
    from mamo.training.run_dir import CONFIG

    with no_code_from(folder):
        return load_config(folder / CONFIG)


def build_config(values: Values, origin: str = "config") -> RunConfig:
    """Validate plain values; see `mamo.config.load.build_config`."""
    return load.build_config(values, origin, config_type_of, CONFIG_TYPES)


def finetune_config(path: Path, overrides: Sequence[str], is_resume: bool) -> RunConfig:
    """Load the config of a run that starts from a checkpoint; see `mamo.training.resume.finetune_config`."""
    from mamo.training import resume

    return resume.finetune_config(path, overrides, is_resume, build_config)
