"""The kinds of task that `task` in a config names: one function each, which makes the parts of a run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mamo.config import Config
from mamo.data.collate import PairBatch
from mamo.evaluation.zero_shot import check_files, zero_shot
from mamo.tasks.build import build_collator, build_network, build_train_source
from mamo.tasks.grounding import grounding_parts
from mamo.tasks.matching import matching_parts
from mamo.tasks.mlim import mlim_parts
from mamo.tasks.parts import Parts, Trained, pictures_of
from mamo.tasks.pretrain import PretrainTask
from mamo.tasks.reasoning import reasoning_parts
from mamo.tasks.vqa import vqa_parts
from mamo.training.alarms import ITM_CLASS_PRIOR, word_entropy
from mamo.training.run_folder import STATEMENT_SCORES


def parts_of(config: Config, tokenizer: Any, stored: Path | None) -> Parts:
    """The parts of the config's kind of task; see `Parts` for the arguments."""
    return KINDS[config.task](config, tokenizer, stored)


def pretrain_parts(config: Config, tokenizer: Any, stored: Path | None) -> Parts:
    """Pre-training, and fine-tuning on the same losses (retrieval): pairs in, zero-shot evaluation out."""
    network = build_network(config, len(tokenizer), tokenizer.pad_token_id)
    encoder = network.backbone.image_encoder

    def evaluate(trained: Trained, folder: Path) -> dict[str, float]:
        scores_file = folder / STATEMENT_SCORES
        return zero_shot(trained.network, config, trained.tokenizer, trained.normalise, trained.device, scores_file)

    return Parts(
        network=network,
        image_encoder=encoder,
        source=functools.partial(build_train_source, config),
        collator=build_collator(config, tokenizer, encoder.grid),
        task=functools.partial(PretrainTask, config, network),
        evaluate=evaluate,
        baselines=functools.partial(_pretrain_baselines, config, tokenizer),
        pictures=functools.partial(pictures_of, config),
        check=functools.partial(check_files, config),
    )


def _pretrain_baselines(config: Config, tokenizer: Any, batch: PairBatch) -> dict[str, float]:
    candidates = config.training.batch_size_global + config.losses.queue_size
    return {
        "loss/itm": ITM_CLASS_PRIOR,
        "loss/mlm": word_entropy(tokenizer, batch.input_ids, batch.is_valid),
        "loss/itc": float(torch.tensor(float(candidates)).log()),
    }


KINDS: dict[str, Callable[[Config, Any, Path | None], Parts]] = {
    "pretrain": pretrain_parts,
    "grounding": grounding_parts,
    "vqa": vqa_parts,
    "reasoning": reasoning_parts,
    "mlim": mlim_parts,
    "matching": matching_parts,
}
