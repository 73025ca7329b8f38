"""Export a checkpoint as a small step folder: the student, its tokenizer, config, lineage, evaluations and card.

Every command that reads a step folder reads it. A shipped network (`mamo.config.shipped`) is such a folder.
"""

import logging
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mamo.config.values import Values
from mamo.reports.card import evaluations_of, model_card
from mamo.tasks.registry import load_stored_config
from mamo.training import checkpoint
from mamo.training.run_dir import CONFIG, RESULTS, dump, write_evaluations

logger = logging.getLogger(__name__)

CARD = "README.md"
_OF_TRAINING = (checkpoint.MANIFEST, "state.json", checkpoint.EVALUATIONS, CONFIG, RESULTS, CARD)
"""Files of a step folder that are written anew, or left out."""


def export_checkpoint(
    source: Path, to: Path, dtype: torch.dtype | None = None, overwrite: bool = False
) -> list[Values]:
    """Write the student of a checkpoint into a step folder of its own.

    The evaluations of its step are kept where the weights keep their bits.

    Args:
        source: a run folder, a step folder, or a shipped network.
        to: the folder to write.
        dtype: of the stored floating-point tensors; None keeps theirs.
        overwrite: replace an earlier export.

    Returns:
        The evaluations in the new folder.

    Raises:
        CheckpointError: there is no undamaged checkpoint, or the disk is full.
        ValueError: `to` exists and is not an earlier export to replace, or lies in the checkpoints of a run.
    """
    folder = checkpoint.resolve(source)
    _check_target(to, overwrite)
    stored, state = checkpoint.read_tensors(folder, "student"), checkpoint.read_state(folder)
    weights = {name: _cast(value, dtype) for name, value in stored.items()}
    found = evaluations_of(folder, state["step"])
    if any(not torch.equal(weights[name].to(value.dtype), value) for name, value in stored.items()):
        if found:
            logger.info("%s: without %d evaluations, which are of the weights before rounding", to, len(found))
        found = []
    entries = [{**entry, "checkpoint": "."} for entry in found]
    config = load_stored_config(folder).model_copy(update={"output_dir": f"runs/{to.name}"})
    files = {
        path.name: path
        for path in folder.iterdir()
        if path.suffix != ".safetensors" and path.name not in _OF_TRAINING and not path.name.startswith(".")
    }
    with tempfile.TemporaryDirectory() as scratch:
        dump(config, Path(scratch) / CONFIG)
        write_evaluations(Path(scratch), entries)
        files |= {name: Path(scratch) / name for name in (CONFIG, RESULTS)}
        checkpoint.write_folder(to, {"student": weights}, state, files)
    (to / CARD).write_text(model_card(to, config), "utf-8")
    return entries


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _check_target(to: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier export. Raises ValueError."""
    if "checkpoints" in (to.name, to.resolve().parent.name):
        raise ValueError(f"--to: {to} belongs to the checkpoints of a run; name another folder")
    if os.path.lexists(to) and not (overwrite and (to / checkpoint.MANIFEST).is_file()):
        rest = "name another folder" if overwrite else "name another folder, or replace an export by --overwrite"
        raise ValueError(f"--to: {to} exists; {rest}")
