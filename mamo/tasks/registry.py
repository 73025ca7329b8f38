"""The kinds of task that `task` in a config names: one function each, which makes the parts of a run."""

import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mamo.config import load
from mamo.config.schema import RunConfig
from mamo.models.build import build_network
from mamo.tasks.base import Parts, Trained, pictures_of
from mamo.tasks.grounding.config import GroundingConfig
from mamo.tasks.grounding.task import grounding_parts
from mamo.tasks.mlim.config import MatchingConfig, MlimConfig
from mamo.tasks.mlim.matching import matching_parts
from mamo.tasks.mlim.pretrain import mlim_parts
from mamo.tasks.pretrain.batch import PairBatch, pair_collator
from mamo.tasks.pretrain.config import PretrainConfig
from mamo.tasks.pretrain.evaluate import check_files, evaluate_pretrained
from mamo.tasks.pretrain.task import PretrainTask
from mamo.tasks.reasoning.config import ReasoningConfig
from mamo.tasks.reasoning.task import reasoning_parts
from mamo.tasks.sources import pair_dataset
from mamo.tasks.vqa.config import VqaConfig
from mamo.tasks.vqa.task import vqa_parts
from mamo.training import resume
from mamo.training.monitors import ITM_CLASS_PRIOR, word_entropy
from mamo.training.run_dir import STATEMENT_SCORES


def parts_of(config: RunConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """The parts of the config's kind of task; see `Parts` for the arguments."""
    return KINDS[config.task](config, tokenizer, stored)


def pretrain_parts(config: PretrainConfig, tokenizer: Any, stored: Path | None) -> Parts:
    """Pre-training, and fine-tuning on the same losses (retrieval): pairs in, zero-shot evaluation out."""
    network = build_network(config, len(tokenizer), tokenizer.pad_token_id)
    encoder = network.backbone.image_encoder

    def evaluate(trained: Trained, folder: Path) -> dict[str, float]:
        scores_file = folder / STATEMENT_SCORES
        return evaluate_pretrained(
            trained.network, config, trained.tokenizer, trained.normalise, trained.device, scores_file
        )

    return Parts(
        network=network,
        image_encoder=encoder,
        source=functools.partial(pair_dataset, config),
        collator=pair_collator(config, tokenizer, encoder.grid),
        task=functools.partial(PretrainTask, config, network),
        evaluate=evaluate,
        baselines=functools.partial(_pretrain_baselines, config, tokenizer),
        pictures=functools.partial(pictures_of, config),
        check=functools.partial(check_files, config),
    )


def _pretrain_baselines(config: PretrainConfig, tokenizer: Any, batch: PairBatch) -> dict[str, float]:
    candidates = config.training.batch_size_global + config.losses.queue_size
    return {
        "loss/itm": ITM_CLASS_PRIOR,
        "loss/mlm": word_entropy(tokenizer, batch.input_ids, batch.is_valid),
        "loss/itc": float(torch.tensor(float(candidates)).log()),
    }


KINDS: dict[str, Callable[[Any, Any, Path | None], Parts]] = {
    "pretrain": pretrain_parts,
    "grounding": grounding_parts,
    "vqa": vqa_parts,
    "reasoning": reasoning_parts,
    "mlim": mlim_parts,
    "matching": matching_parts,
}

CONFIG_TYPES: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "grounding": GroundingConfig,
    "vqa": VqaConfig,
    "reasoning": ReasoningConfig,
    "mlim": MlimConfig,
    "matching": MatchingConfig,
}


def config_type_of(task: str) -> type[RunConfig]:
    """Return the config type of a task. Raises ValueError for an unknown name."""
    if task not in CONFIG_TYPES:
        near = difflib.get_close_matches(task, CONFIG_TYPES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(CONFIG_TYPES)}"
        raise ValueError(f"task: unknown task {task!r}; {hint}")
    return CONFIG_TYPES[task]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply `section.key=value` overrides; see `mamo.config.load.build_config`."""
    return load.load_config(path, overrides, config_type_of, CONFIG_TYPES)


def build_config(values: dict[str, Any], origin: str = "config") -> RunConfig:
    """Validate plain values; see `mamo.config.load.build_config`."""
    return load.build_config(values, origin, config_type_of, CONFIG_TYPES)


def finetune_config(path: Path, overrides: Sequence[str], is_resume: bool) -> RunConfig:
    """Load the config of a run that starts from a checkpoint; see `mamo.training.resume.finetune_config`."""
    return resume.finetune_config(path, overrides, is_resume, build_config)
