"""What in a config contradicts itself, although each value alone is allowed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mamo.config.presets import PRESETS

if TYPE_CHECKING:
    from mamo.config.schema import Config, LossConfig

_READS = {
    "pretrain": ("pairs", ("masking", "losses", "teacher")),
    "grounding": ("records", ("masking", "losses", "teacher")),
    "vqa": ("records", ("vqa",)),
    "reasoning": ("records", ("reasoning",)),
    "mlim": ("pairs", ("masking", "losses")),
    "matching": ("scenes", ("matching",)),
}
"""What files a kind of task reads, and which of the sections that not every kind reads: elsewhere they are refused."""
MLIM_TASKS = ("mlim", "matching")
_MLIM_MODEL = {"preset", "text", "dropout", "embedder_layers"}
_MLIM_MASKING = {"mode", "image_ratio", "image_style", "text_ratio", "text_unit", "light_ratio"}
_MLIM_LOSSES = ("mlm", "itm", "recon")
_MLIM_LOSS_KEYS = {"weights", "itm_pool_size", "recon_area"}


def reads(task: str, section: str) -> bool:
    """Whether a kind of task reads a section that not every kind reads."""
    return section in _READS[task][1]


def contradictions(config: "Config") -> Iterator[str]:
    """One line, `dotted.key: what is wrong`, for each thing in a config that cannot hold together."""
    data, training = config.data, config.training
    files, sections = _READS[config.task]
    for section in sorted({name for _, names in _READS.values() for name in names} - {*sections}):
        if getattr(config, section) != type(getattr(config, section))():
            yield f"{section}: task {config.task} does not read it; take it out"
    if data.source not in ("scenes", files):
        yield f"data.source: {data.source} contradicts task {config.task}; use {' or '.join({'scenes': 0, files: 0})}"
    if data.source != "scenes" and not data.train_files:
        yield f"data.train_file: needed when data.source is {data.source}"
    if data.source != "scenes" and config.evaluation.enabled and data.eval_file is None:
        yield f"data.eval_file: needed when evaluation.enabled is true; name held-out {files} or disable evaluation"
    if data.source == "scenes":
        for key in ("train_file", "train_split", "eval_file", "eval_split", "statements_file"):
            if getattr(data, key) is not None:
                yield f"data.{key}: contradicts data.source: scenes; use data.source: {files}"
    yield from _curriculum_contradictions(config)
    if data.source != "pairs" and config.evaluation.retrieval_folds > 1:
        yield f"evaluation.retrieval_folds: divides the images of data.source: pairs alone, not of {data.source}"
    if data.source == "records":
        for key in ("train_split", "eval_split", "statements_file"):
            if getattr(data, key) is not None:
                yield f"data.{key}: contradicts data.source: records, whose files hold one split each"
    if config.from_scratch and config.checkpoint is None:
        yield "from_scratch: needs a checkpoint, whose architecture it takes"
    if config.model.fusion_type == "cross":
        yield from _cross_contradictions(config)
    if training.warmup_steps > training.total_steps:
        yield f"training.warmup_steps: {training.warmup_steps} is more than total_steps {training.total_steps}"
    if training.learning_rate_min > training.learning_rate:
        yield "training.learning_rate_min: is above training.learning_rate"
    if training.optimizer == "muon" and training.parallel == "fsdp":
        yield "training.optimizer: muon needs whole matrices, which training.parallel: fsdp splits; use ddp or adamw"
    micro = training.micro_batch_size or training.batch_size_global
    if training.batch_size_global % micro:
        yield f"training.micro_batch_size: {micro} does not divide batch_size_global {training.batch_size_global}"
    if config.model.text.weights == "bert" and config.model.text.bert is None:
        yield "model.text.bert: needed when model.text.weights is bert"
    yield from _of_the_other_system(config)
    if config.task == "mlim":
        if data.source == "pairs" and config.evaluation.enabled:
            yield "evaluation.enabled: MLIM's pre-training is evaluated on scenes alone; use false with pairs"
        if config.losses.weights.itm and micro % config.losses.itm_pool_size:
            yield f"losses.itm_pool_size: {config.losses.itm_pool_size} does not divide the micro-batch of {micro}"
    elif "losses" in sections:
        if config.losses.itm_negatives == "foils" and config.task != "grounding":
            yield f"losses.itm_negatives: only records of grounding have foils; use pool with task {config.task}"
        yield from _loss_contradictions(config.losses, micro, training.batch_size_global)


def _curriculum_contradictions(config: "Config") -> Iterator[str]:
    data = config.data
    stages = data.curriculum_scenes
    if stages and (data.source != "scenes" or _READS[config.task][0] != "pairs"):
        yield "data.curriculum_scenes: is for image-text pairs of data.source: scenes; take it out"
    if sum(stages) > data.train_scenes:
        yield f"data.curriculum_scenes: {sum(stages)} scenes are more than train_scenes {data.train_scenes}"
    if any(n % 2 for n in stages):
        yield "data.curriculum_scenes: scenes come in pairs; use even numbers"


def _cross_contradictions(config: "Config") -> Iterator[str]:
    on_image = [name for name in ("mim", "mrm_image") if getattr(config.losses.weights, name)]
    if reads(config.task, "losses") and on_image:
        yield (
            f"model.fusion_type: cross gives no fused image tokens, which {' and '.join(on_image)} would learn from; "
            f"set {' and '.join(f'losses.weights.{name}' for name in on_image)} to 0 or use concat"
        )
    training = config.training
    adapted = {"parallel": training.parallel == "fsdp", "compile": training.compile}
    adapted["activation_checkpointing"] = training.activation_checkpointing
    for key, is_used in adapted.items():
        if is_used:  # they act on a layer's `forward`, and cross-attention layers are called in parts
            yield f"training.{key}: does not reach the layers of model.fusion_type: cross; use its default or concat"
    if config.task == "reasoning" or (config.task == "vqa" and config.vqa.head == "decoder"):
        yield f"model.fusion_type: cross gives no fused image tokens, which task {config.task} reads; use concat" + (
            " or vqa.head: classifier" if config.task == "vqa" else ""
        )


def _of_the_other_system(config: "Config") -> Iterator[str]:
    """What only MAMO reads in a config of MLIM's, and the other way round."""
    losses, model, masking = config.losses, config.model, config.masking
    is_mlim = config.task in MLIM_TASKS
    system = "MLIM" if is_mlim else "MAMO"
    preset = type(model).model_validate(PRESETS[model.preset])
    for key in type(model).model_fields:
        is_read = key in _MLIM_MODEL if is_mlim else key != "embedder_layers"
        if not is_read and getattr(model, key) != getattr(preset, key):
            yield f"model.{key}: task {config.task} ({system}) does not read it; take it out"
    if not reads(config.task, "losses"):
        return
    for name, weight in losses.weights:
        if weight and (name not in _MLIM_LOSSES if is_mlim else name == "recon"):
            yield f"losses.weights.{name}: is no loss of {system} (task {config.task}); use 0"
    if is_mlim and all(getattr(losses.weights, name) == 0 for name in _MLIM_LOSSES):
        yield "losses.weights: every loss of MLIM is switched off"
    for key in type(losses).model_fields.keys() - {"weights"}:
        is_read = key in _MLIM_LOSS_KEYS if is_mlim else key != "recon_area"
        if not is_read and getattr(losses, key) != getattr(type(losses)(), key):
            yield f"losses.{key}: task {config.task} ({system}) does not read it; take it out"
    if (masking.mode == "modality_aware") != is_mlim:
        choice = "modality_aware" if is_mlim else "alternate or joint"
        yield f"masking.mode: {masking.mode} is no mode of {system} (task {config.task}); use {choice}"
    for key in type(masking).model_fields:
        is_read = key in _MLIM_MASKING if is_mlim else key != "light_ratio"
        if not is_read and getattr(masking, key) != getattr(type(masking)(), key):
            yield f"masking.{key}: task {config.task} ({system}) does not read it; take it out"


def _loss_contradictions(losses: "LossConfig", micro: int, batch_size_global: int) -> Iterator[str]:
    if all(weight == 0 for weight in dict(losses.weights).values()):
        yield "losses.weights: every loss is switched off"
    if losses.itc_candidates == "batch" and losses.queue_size:
        yield "losses.queue_size: contradicts losses.itc_candidates: batch; use 0"
    if losses.itc_candidates == "batch" and losses.itc_soft_target_alpha:
        yield "losses.itc_soft_target_alpha: contradicts losses.itc_candidates: batch; use 0"
    for key, name in (("mlm_soft_target_alpha", "mlm"), ("itc_soft_target_alpha", "itc")):
        if getattr(losses, key) and not getattr(losses.weights, name):
            yield f"losses.{key}: contradicts losses.weights.{name}: 0; use 0"
    if losses.mim_target == "pixels" and not losses.weights.mim:
        yield "losses.mim_target: pixels contradicts losses.weights.mim: 0; take it out"
    if losses.weights.itm and micro % losses.itm_pool_size:
        yield f"losses.itm_pool_size: {losses.itm_pool_size} does not divide the micro-batch of {micro}"
    if losses.itc_candidates == "batch" and micro != batch_size_global:
        yield "losses.itc_candidates: batch contrasts within a forward pass; use teacher with micro-batches"
