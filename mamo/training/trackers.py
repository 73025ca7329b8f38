"""Experiment trackers that `logging.trackers` names: TensorBoard, Weights & Biases, classes by their import path."""

import importlib.util
import json
import logging
import netrc
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from mamo.config.schema import RunConfig
from mamo.distributed import rank
from mamo.imports import import_value, is_import_path
from mamo.training.run_dir import TensorBoardTracker, Tracker, atomic_write_text, check_trackers, warn_of_tracker

logger = logging.getLogger(__name__)

WANDB_ID = "wandb_id"
"""File in a run's folder: the id under which Weights & Biases knows the run, kept when it is resumed."""
_HOST = ("api.wandb.ai", 443)
_PATIENCE_S = 3.0


class WandbTracker:
    """Log to Weights & Biases: one run of theirs for each run folder, also after a resume."""

    def __init__(self, folder: Path, config: RunConfig, first_step: int) -> None:
        """Start or resume the run.

        Without `WANDB_MODE` in the environment it is online where their server answers and a key is stored, else
        offline: `wandb sync` sends the files later.

        Args:
            folder: of the run.
            config: stored with the run; `logging.project` is the project.
            first_step: the first step that will be logged.
        """
        import wandb

        file = folder / WANDB_ID
        if not file.is_file():
            atomic_write_text(file, secrets.token_hex(4))
        identifier = file.read_text("utf-8").strip()
        self.run = wandb.init(
            project=config.logging.project,
            name=folder.name,
            id=identifier,
            resume="allow",
            dir=str(folder),
            config=json.loads(config.model_dump_json()),
            mode="online" if _is_online() else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("*", step_metric="step")  # their own step cannot go back, as a resumed run's does
        logger.info("wandb: run %s of project %s, %s", identifier, config.logging.project, self.run.settings.mode)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Write what is left and end."""
        self.run.finish()


def _is_online() -> bool:
    """Return whether values can be sent: as `WANDB_MODE` says, else by a key and an answer of the server."""
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return mode == "online"
    try:
        if not os.environ.get("WANDB_API_KEY") and netrc.netrc().authenticators(_HOST[0]) is None:
            return False
        socket.create_connection(_HOST, _PATIENCE_S).close()
    except (OSError, netrc.NetrcParseError):
        return False
    return True


def check_named_trackers(config: RunConfig) -> None:
    """Raise ValueError where a tracker of `logging.trackers` is not installed, or is none."""
    for number, name in enumerate(config.logging.trackers):
        key = f"logging.trackers.{number}"
        if name == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"{key}: wandb is not installed; use `pip install mamo[wandb]`, or remove it")
        if name in ("tensorboard", "wandb"):
            continue
        if not is_import_path(name):
            raise ValueError(
                f"{key}: use tensorboard, wandb or the import path of a class, module:Class ({name!r} found)"
            )
        found = import_value(name, key)
        lacking = [method for method in ("log", "close") if not callable(getattr(found, method, None))]
        if not isinstance(found, type) or lacking:
            raise ValueError(f"{key}: {name} is no class with the methods log and close")


def open_trackers(config: RunConfig, start_step: int, trackers: Sequence[Tracker] = ()) -> list[Tracker]:
    """Return the trackers of `logging.trackers`, then `trackers`, on rank 0; nothing elsewhere.

    A class from outside is called with (folder of the run, config, first step). One that fails to start is left out
    with a warning, except TensorBoard's.
    """
    if rank() != 0:
        return []
    folder, opened = Path(config.output_dir), list[Tracker]()
    for number, name in enumerate(config.logging.trackers):
        if name == "tensorboard":
            opened.append(TensorBoardTracker(folder / "tensorboard", start_step + 1))
            continue
        kind = WandbTracker if name == "wandb" else import_value(name, f"logging.trackers.{number}")
        try:
            made: Tracker = kind(folder, config, start_step + 1)
            check_trackers([made])
            opened.append(made)
        except Exception as error:
            warn_of_tracker(name, error, "at its start; the run goes on without it")
    return [*opened, *trackers]
