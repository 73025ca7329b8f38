"""Implement `mamo.load`: load a model from a folder or a hub name, or raise one clear error."""

import difflib
import os
import re
from pathlib import Path

import torch

from mamo.config.shipped import find_network, networks_hint
from mamo.hub import hub_folder
from mamo.inference.hf_export import FILES, WEIGHTS, is_exported, read_exported
from mamo.inference.model import Model, model_of
from mamo.reports.card import model_card
from mamo.tasks.registry import load_stored_config, task_class
from mamo.tasks.restore import restore_task
from mamo.training import checkpoint
from mamo.training.checkpoint import CheckpointError
from mamo.training.precision import Precision, choose_device


def load(path: str | Path, device: str | torch.device = "auto", precision: Precision = "fp32") -> Model:
    """Load a trained model.

    >>> import mamo
    >>> model = mamo.load("runs/scenes", device="cpu")
    >>> model.similarity(["a.jpg", "b.jpg"], ["a red circle"]).shape
    torch.Size([2, 1])

    Args:
        path: a run folder (its last checkpoint), a step folder, a folder written by `save_pretrained`, the name of a
            shipped network, or a name on the hub (`user/name`, needs network). A folder that exists comes first.
        device: `auto` (CUDA if available), `cpu`, `cuda`, `cuda:1` or a `torch.device`.
        precision: of weights and activations; scores are always float32.

    Raises:
        CheckpointError: missing, damaged, of another architecture, an MLIM, or not a checkpoint of `mamo`. Only
            safetensors and JSON are read: no pickle is ever opened.
        TokenizerMismatchError: the tokenizer differs from the one used in training; a CheckpointError.
        DeviceError: there is no such device, as CUDA on a machine without it.
        ValueError: unknown precision.

    The model's methods raise `MissingHeadError`, `BadSampleError` (an unreadable image), `EmptyGalleryError` and, for
    other invalid arguments, ValueError, which is a base class of all of these.
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"give the path of a run, a step or an exported folder, not {path!r:.80}")
    folder, name, where = find_network(Path(path)), str(path), choose_device(device)
    if is_exported(folder):
        return model_of(*read_exported(folder, where), precision)
    if not folder.exists() and not folder.parent.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        try:
            folder = hub_folder(name, [f"{WEIGHTS}.safetensors"], FILES)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return model_of(*read_exported(folder, where), precision)
    if not folder.is_dir():
        hint = _near(folder) or networks_hint(folder)
        raise CheckpointError(f"{path}: no such folder; give a run, a step or an exported folder{hint}")
    folder = checkpoint.resolve(folder)
    try:
        config = load_stored_config(folder)
        if not task_class(config.task).has_api:
            raise CheckpointError(
                f"{folder} is an MLIM (task {config.task}), which only `mamo finetune` and `mamo evaluate` read"
            )
        task, predictor = restore_task(folder, config, where)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # a config of another version, no tokenizer
        raise CheckpointError(f"{folder}: not a readable checkpoint: {error}") from error
    return model_of(predictor, config, model_card(folder, config), task.assets, precision)


def _near(folder: Path) -> str:
    """Return a hint at an existing folder for the error message."""
    if folder.is_file():
        return ". To start a run from ALBEF's published file, use checkpoint=FILE"
    siblings = [other.name for other in folder.parent.iterdir() if other.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, 1)
    return f". Did you mean {folder.parent / near[0]}?" if near else ""
