"""Export a trained network in Hugging Face's layout: config.json, model.safetensors, tokenizer, README.md."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from mamo.config.schema import RunConfig
from mamo.config.values import Values
from mamo.data.tokenizer import TOKENIZER_FILES
from mamo.evaluation.predictor import Predictor
from mamo.imports import no_code_from
from mamo.models.text_encoder import PublishedTextTower
from mamo.models.vlm import Network
from mamo.models.weights import save_file
from mamo.tasks.registry import build_config
from mamo.tasks.restore import restore_task
from mamo.training.checkpoint import MANIFEST, CheckpointError
from mamo.training.run_dir import BERT
from mamo.training.run_dir import CONFIG as RUN_CONFIG

CONFIG, WEIGHTS, CARD = "config.json", "model", "README.md"
FILES = ("*.json", "*.txt", f"{WEIGHTS}.safetensors", CARD, f"{BERT}/{CONFIG}")
"""Patterns of the files that `read_exported` reads."""
_SAMPLE = "A RED circle, an élan-blue  square; 2 STARS' 3.5 don't\tÅngström 東京 [MASK]"
"""Capitals, accents, marks, spaces and another script, on which tokenizers of one vocabulary may differ."""
_HEADER = "---\nlibrary_name: mamo\ntags: [mamo, vision-language, image-text-retrieval]\n---\n\n"


class TokenizerMismatchError(CheckpointError):
    """The exported tokenizer differs from the one used in training.

    >>> import mamo
    >>> issubclass(mamo.TokenizerMismatchError, mamo.CheckpointError)
    True
    """


def is_exported(folder: Path) -> bool:
    """Return whether the folder has this layout, complete or damaged."""
    return (folder / CONFIG).is_file() or (folder / f"{WEIGHTS}.safetensors").is_file()


def check_target(folder: Path, assets: Mapping[str, str]) -> None:
    """Refuse a folder whose files an export would damage.

    Raises:
        ValueError: it is in a run or below its checkpoints; or it has files, under names that an export writes, which
            are not of an earlier export.
    """
    upwards = [folder.resolve(), *folder.resolve().parents]
    is_below = any(place.name == "checkpoints" and (place.parent / RUN_CONFIG).exists() for place in upwards)
    if is_below or (folder / "checkpoints").exists() or any((place / MANIFEST).exists() for place in upwards):
        raise ValueError(f"save_pretrained: {folder} is the folder of a run or checkpoint; name another folder")
    names = (
        []
        if _is_ours(folder / CONFIG)
        else [CONFIG, f"{WEIGHTS}.safetensors", *TOKENIZER_FILES, f"{BERT}/{CONFIG}", *assets]
    )
    found = [name for name in names if (folder / name).exists()]
    card = folder / CARD
    if card.exists() and not (card.is_file() and card.read_bytes().startswith(_HEADER.split("tags")[0].encode())):
        found = [CARD, *found]
    if found:
        raise ValueError(
            f"save_pretrained: {folder / found[0]} is not of an earlier export and would be overwritten; "
            "move it, or name another folder"
        )


def _is_ours(config: Path) -> bool:
    """Return whether a config.json was written by `write_exported`."""
    try:
        values = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and isinstance(values.get("mamo"), dict)


def write_exported(
    folder: Path,
    network: Network,
    tokenizer: PreTrainedTokenizerFast,
    config: RunConfig,
    card: str,
    assets: Mapping[str, str],
) -> None:
    """Write a network into an existing folder; a named text encoder's config goes to `bert/`."""
    tokenizer.save_pretrained(folder)
    once = {  # a tied tensor only under its first name
        name for name, _ in [*network.named_parameters(), *network.named_buffers()]
    }
    tensors = {key: value.cpu().contiguous() for key, value in network.state_dict().items() if key in once}
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    text_encoder = network.backbone.text_encoder
    if config.model.text_source is not None and isinstance(text_encoder, PublishedTextTower):
        text_encoder.config.save_pretrained(folder / BERT)
    for name, text in assets.items():
        (folder / name).write_text(text, "utf-8")
    names = [f"{WEIGHTS}.safetensors", f"{BERT}/{CONFIG}", *assets]
    values: Values = {
        "vocabulary": _fingerprint(tokenizer),
        "mamo": config.model_dump(mode="json"),
        "sha256": {name: _sha256(folder / name) for name in names if (folder / name).is_file()},
    }
    values["sha256"]["mamo"] = _digest_of(values["mamo"])
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    (folder / CARD).write_text(_HEADER + card, "utf-8")


def read_exported(folder: Path, device: torch.device) -> tuple[Predictor, RunConfig, str, Mapping[str, str]]:
    """Load the network on `device`, the config of its run, its card, and its assets (`Task.assets`).

    Raises:
        CheckpointError: a file is missing, damaged or not of this layout. Nothing is unpickled, and no code is imported
            from the folder or the current directory.
        TokenizerMismatchError: the tokenizer differs from the one used in training.
    """
    try:
        values = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("mamo"), dict):
            raise ValueError(f"its {CONFIG} describes another kind of model")
        with no_code_from(folder, is_foreign=True):
            config = build_config(values["mamo"], str(folder / CONFIG))
            task, predictor = restore_task(folder, config, device, weights=WEIGHTS, tokenizer=".")
        _verify(folder, values)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # JSON of another shape
        raise CheckpointError(
            f"{folder}: not a model written by save_pretrained: {' '.join(str(error).split())}"
        ) from None
    if values.get("vocabulary") != _fingerprint(predictor.processor.tokenizer):
        raise TokenizerMismatchError(f"{folder}: the tokenizer differs from the one the weights were trained with")
    card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
    return predictor, config, re.sub(r"\A---\n.*?\n---\n\n?", "", card, flags=re.DOTALL), task.assets


def _verify(folder: Path, values: Values) -> None:
    """Compare the content of a folder with the digests in its config; versions before 0.2 wrote none."""
    digests = values.get("sha256", {})
    for name, digest in digests.items():
        if name == "mamo":
            is_same = digest == _digest_of(values["mamo"])
        elif not (folder / name).is_file():
            raise CheckpointError(f"{folder}: damaged export, {name} is missing")
        else:
            is_same = digest == _sha256(folder / name)
        if not is_same:
            changed = f"`mamo` in {CONFIG}" if name == "mamo" else name
            raise CheckpointError(f"{folder}: damaged export, the content of {changed} has changed; fetch it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(values: Values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hex digits of the vocabulary and of the tokens of `_SAMPLE`, equal for tokenizers that agree."""
    read = [tokenizer.get_vocab(), tokenizer(_SAMPLE)["input_ids"]]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]
