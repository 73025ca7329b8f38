"""The functions of the package's front: build a task, and train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mamo.config.schema import RunConfig
from mamo.config.shipped import find_config
from mamo.imports import add_folder_of
from mamo.tasks.base import Task
from mamo.tasks.registry import build_config, build_task, load_config
from mamo.tasks.sources import tokenizer_of
from mamo.trainer import train as run_training
from mamo.training.run_dir import Tracker

ConfigLike = str | Path | Mapping[str, object] | RunConfig
"""A config file or the name of a shipped one of pre-training, its values as a dict, or a validated config."""


def as_config(config: ConfigLike) -> RunConfig:
    """Validate a config in any form. Raises ValueError with every problem."""
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return build_config(dict(config))
    file = find_config(str(config), "pretrain")
    add_folder_of(file)
    return load_config(file)


def build(config: ConfigLike) -> Task:
    """Build the task of a config: its network, data, collator and losses.

    >>> import mamo
    >>> task = mamo.build("scenes")
    >>> type(task.network).__name__, sorted(task.weights)
    ('Mamo', ['itc', 'itm', 'mim', 'mlm', 'mrm_image', 'mrm_text'])

    Args:
        config: see `ConfigLike`; `output_dir` may be left out of a dict, as nothing is written.

    Raises:
        ValueError: a mistake in the config, or a `checkpoint`, whose weights only a training takes.
    """
    if isinstance(config, Mapping):
        config = {"output_dir": "unused", **config}
    checked = as_config(config)
    if checked.checkpoint is not None and not checked.from_scratch:
        raise ValueError(
            f"checkpoint: mamo.build starts from random weights, not from {checked.checkpoint}; load a trained network "
            "by mamo.load(FOLDER).network, train on from it by mamo.train(config), or leave `checkpoint` out"
        )
    return build_task(checked, tokenizer_of(checked))


def train(config: ConfigLike, is_resume: bool = False, trackers: Sequence[Tracker] = ()) -> Path:
    """Train, evaluate and write everything into the config's `output_dir`; see `mamo.trainer.train`.

    >>> import mamo
    >>> folder = mamo.train("runs/scenes/config.yaml", is_resume=True)
    >>> (folder / "checkpoints/last").is_dir()
    True

    Args:
        config: see `ConfigLike`.
        is_resume: continue the run in `output_dir`.
        trackers: list of further receivers of each step's metrics, see `Tracker`.

    Returns:
        `output_dir`.

    Raises:
        ValueError: a mistake in the config, the data, the checkpoint or `trackers`.
    """
    checked = as_config(config)
    run_training(checked, is_resume, trackers)
    return Path(checked.output_dir)
