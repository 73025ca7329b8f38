"""The table of tasks, and classes named by an import path."""

from pathlib import Path
from typing import Any

from mamo.config.schema import Config
from mamo.tasks.base import Task
from mamo.tasks.grounding.task import GroundingTask
from mamo.tasks.mlim.matching import MatchingTask
from mamo.tasks.mlim.pretrain import MlimTask
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.reasoning.task import ReasoningTask
from mamo.tasks.vqa.task import VqaTask

TASKS: dict[str, type[Task]] = {
    "pretrain": PretrainTask,
    "grounding": GroundingTask,
    "vqa": VqaTask,
    "reasoning": ReasoningTask,
    "mlim": MlimTask,
    "matching": MatchingTask,
}


def build_task(config: Config, tokenizer: Any, stored: Path | None = None) -> Task:
    """Build the task that the config names; see `Task` for the arguments."""
    return TASKS[config.task](config, tokenizer, stored)


def is_same_network(one: str, other: str) -> bool:
    """Say whether two tasks have the same network, so that a checkpoint of one can be evaluated as the other."""
    first, second = TASKS[one], TASKS[other]
    return issubclass(first, second) or issubclass(second, first)
