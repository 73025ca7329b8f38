"""Export a trained network in Hugging Face's layout: config.json, model.safetensors, tokenizer, README.md."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from mamo.config.schema import RunConfig
from mamo.evaluation.predictor import Predictor
from mamo.imports import no_code_from
from mamo.models.text_encoder import TextEncoder
from mamo.models.vlm import Network
from mamo.models.weights import save_file
from mamo.tasks.registry import build_config
from mamo.tasks.restore import restore_task
from mamo.training.checkpoint import CheckpointError
from mamo.training.run_dir import BERT

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


def write_exported(
    folder: Path,
    network: Network,
    tokenizer: PreTrainedTokenizerFast,
    config: RunConfig,
    card: str,
    assets: Mapping[str, str],
) -> None:
    """Write a network into an existing folder; the config of a BERT named by `model.text.bert` goes to `bert/`."""
    tokenizer.save_pretrained(folder)
    values = {
        "vocabulary": _fingerprint(tokenizer),
        "mamo": config.model_dump(mode="json"),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    once = {  # a tied tensor only under its first name
        name for name, _ in [*network.named_parameters(), *network.named_buffers()]
    }
    tensors = {key: value.cpu().contiguous() for key, value in network.state_dict().items() if key in once}
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    text_encoder = network.backbone.text_encoder
    if config.model.text.bert is not None and isinstance(text_encoder, TextEncoder):
        text_encoder.bert.config.save_pretrained(folder / BERT)
    for name, text in assets.items():
        (folder / name).write_text(text, "utf-8")
    (folder / CARD).write_text(_HEADER + card, "utf-8")


def read_exported(folder: Path, device: torch.device) -> tuple[Predictor, RunConfig, str, Mapping[str, str]]:
    """Load the network on `device`, the config of its run, its card, and its assets (`Task.assets`).

    Raises:
        CheckpointError: a file is missing, damaged or not of this layout. Nothing is unpickled and no code is run.
        TokenizerMismatchError: the tokenizer differs from the one used in training.
    """
    try:
        values = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("mamo"), dict):
            raise ValueError(f"its {CONFIG} describes another kind of model")
        with no_code_from(folder):
            config = build_config(values["mamo"], str(folder / CONFIG))
        task, predictor = restore_task(folder, config, device, weights=WEIGHTS, tokenizer=".")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # JSON of another shape
        raise CheckpointError(f"{folder}: not a model written by save_pretrained: {error}") from None
    if values.get("vocabulary") != _fingerprint(predictor.processor.tokenizer):
        raise TokenizerMismatchError(f"{folder}: the tokenizer differs from the one the weights were trained with")
    card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
    return predictor, config, re.sub(r"\A---\n.*?\n---\n\n?", "", card, flags=re.DOTALL), task.assets


def _fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hex digits of the vocabulary and of the tokens of `_SAMPLE`, equal for tokenizers that agree."""
    read = [tokenizer.get_vocab(), tokenizer(_SAMPLE)["input_ids"]]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]
