"""Continue a run: find its config, and check that the present one is the same run."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import BertConfig

from mamo.config.conventions import EVALUATED, conventions_of, with_conventions
from mamo.config.load import BuildConfig
from mamo.config.schema import MamoModelConfig, RunConfig
from mamo.config.values import Values, expand_path, flatten, merge, read_values
from mamo.models.published_text import text_config_from
from mamo.training import checkpoint
from mamo.training.optim import is_same_schedule
from mamo.training.run_dir import BERT, CONFIG

logger = logging.getLogger(__name__)

LAYOUT_KEYS = (
    "training.micro_batch_size",
    "training.parallel",
    "training.reshard_after_forward",
    "training.activation_checkpointing",
    "training.compile",
)
RESUME_MAY_CHANGE = (
    "output_dir",
    "data.workers",
    "data.bad_samples.",
    "data.eval_file",
    "data.eval_split",
    "data.eval_caption_keys",
    "data.statements_file",
    "evaluation.",
    "logging.",
    "training.checkpoint_every_steps",
    "training.checkpoints_kept",
    "training.keep_best",
    *LAYOUT_KEYS,
)
"""What may differ when a run is resumed (or its folder was moved): nothing that changes a step beyond its rounding."""
SCHEDULE_KEYS = ("training.total_steps", "training.decay_steps")
"""What may differ when a run is resumed, as long as no step that is done would have had another learning rate."""
MAY_BE_MOVED = ("data.train_file", "data.train", "data.tokenizer")
"""What may be elsewhere when a run is resumed, if its content is the same by the fingerprint and the vocabulary."""
AUTO_KEYS = ("training.precision", "training.device")
"""Written into the resolved config at the first start; `auto` then means what was found."""


def finetune_config(path: Path, overrides: Sequence[str], is_resume: bool, build: BuildConfig) -> RunConfig:
    """Load the config of a run that starts from a checkpoint: see `inherit_from_checkpoint`.

    A resumed run inherits from its own folder, since the checkpoint it began from may be gone.

    Raises:
        ValueError: no `checkpoint`, or none there; a `model` that contradicts it; and as `build` does.
    """
    values = read_values(path, overrides)
    for key in ("output_dir", "checkpoint"):
        if isinstance(values.get(key), str):
            try:
                values[key] = expand_path(values[key])
            except ValueError as error:
                raise ValueError(f"{path}: {key}: {error}") from None
    own_file = Path(str(values.get("output_dir"))) / CONFIG
    if is_resume and own_file.is_file():
        stored = read_values(own_file)
        tokenizer = stored["data"]["tokenizer"]
    elif isinstance(values.get("checkpoint"), str):
        folder = checkpoint.resolve(Path(values["checkpoint"]))
        stored = read_values(folder / CONFIG)
        tokenizer = str(folder / "tokenizer")
    else:
        raise ValueError(f"{path}: name where to start from: checkpoint=RUN_OR_STEP_FOLDER")
    return inherit_from_checkpoint(values, stored, tokenizer, str(path), build)


def inherit_from_checkpoint(
    values: Values, stored: Values, tokenizer: str, origin: str, build: BuildConfig
) -> RunConfig:
    """Build the config of a run that starts from another: model, image size, text length and ITM score are `stored`'s.

    Args:
        values: of the run itself; its `data` goes over what is inherited.
        stored: the values of the other run's config, whose task may be another.
        tokenizer: the other run's.
        origin: names `values` in messages.
        build: makes a config of plain values.

    Raises:
        ValueError: `values` have a `model`; and as `build` does.
    """
    if "model" in values:
        raise ValueError(f"{origin}: model: not allowed here, it comes from the checkpoint; remove the section")
    sizes = {key: stored["data"][key] for key in ("image_size_px", "text_max_tokens")}
    read_by = {key: stored["evaluation"][key] for key in EVALUATED if key in stored.get("evaluation", {})}
    inherited = {"model": stored["model"], "data": {**sizes, "tokenizer": tokenizer}, "evaluation": read_by}
    return build(merge(inherited, values), origin)


def read_lineage(folder: Path) -> list[Values]:
    """Read the lineage of a checkpoint, oldest first, itself last: name, step, data sets, fingerprint of the data.

    Raises:
        CheckpointError: its `state.json` does not hold it.
    """
    state = checkpoint.read_state(folder)
    own = {"checkpoint": str(folder), "step": state["step"], "data_fingerprint": state["data_fingerprint"]}
    own["data_sets"] = state.get("data_sets", [])  # of checkpoints from before it was written: unknown
    return [*state["ancestry"], own]


def trained_data(lineage: Iterable[Values]) -> list[Values]:
    """Read the `data` sections of the checkpoints of a lineage, without those that are gone."""
    files = [Path(link["checkpoint"]) / CONFIG for link in lineage]
    return [read_values(file)["data"] for file in files if file.is_file()]


def check_architecture(config: RunConfig, parent: RunConfig, folder: Path) -> None:
    """Refuse what names and shapes of weights do not show: other attention heads, another function between layers.

    A published text encoder counts by its configuration, the checkpoint's by the one stored with its weights.

    Raises:
        CheckpointError: names the keys.
        ValueError: the BERT that only `config` names cannot be read.
    """
    own, its = config.model, parent.model
    pairs: dict[str, tuple[object, object]] = {}
    if isinstance(own, MamoModelConfig) and isinstance(its, MamoModelConfig):
        pairs["model.image.name"] = own.image.name, its.image.name
        pairs["model.image.heads"] = own.image.heads, its.image.heads
    if own.text_source != its.text_source or own.text.heads != its.text.heads:
        stored, source = _bert_of(parent, folder), own.text_source
        berts = stored if source is not None and source == its.text_source else _bert_of(config), stored
        pairs["model.text.heads"] = berts[0].num_attention_heads, berts[1].num_attention_heads
        for key in ("model_type", "hidden_act", "layer_norm_eps"):
            pairs[f"{key} of model.text.bert"] = getattr(berts[0], key, None), getattr(berts[1], key, None)
    differing = [f"{key} is {mine} here, {theirs} there" for key, (mine, theirs) in pairs.items() if mine != theirs]
    if differing:
        raise checkpoint.CheckpointError(f"{folder} is of another architecture: {'; '.join(differing)}")


def _bert_of(config: RunConfig, folder: Path | None = None) -> Any:
    """Return the configuration of a config's text encoder, of a checkpoint the one stored in its folder."""
    source = config.model.text_source
    if source is None:
        return BertConfig(num_attention_heads=config.model.text.heads)
    is_stored = folder is not None and (folder / BERT).is_dir()
    return text_config_from(str(folder / BERT) if folder is not None and is_stored else source)


def warn_if_not_bit_identical(state: Values, now: dict[str, str]) -> None:
    """Say what makes a resumed run differ from an unbroken one in its last bits.

    Args:
        state: of the checkpoint; what one from earlier versions does not say is taken to be as now.
        now: the library versions and the machine.
    """
    before = {**now, **state["versions"], **state.get("machine", {})}
    changed = [f"{name} {new} (was {before[name]})" for name, new in now.items() if before[name] != new]
    if changed:
        logger.warning("this resume is not bit-identical: %s", ", ".join(changed))


def refuse_another_schedule(present: RunConfig, stored: RunConfig, folder: Path) -> None:
    """Raise ValueError where a step that a run has done would have had another learning rate by `present`.

    The message has the command that goes on from the run's weights.
    """
    now, before = present.training, stored.training
    if all(getattr(now, name) == getattr(before, name) for name in ("total_steps", "decay_steps")):
        return
    n_done = checkpoint.read_state(checkpoint.last_good(folder))["step"] if checkpoint.step_folders(folder) else 0
    if n_done > now.total_steps:
        raise ValueError(
            f"training.total_steps: {now.total_steps} now, and {folder} has {n_done} steps; give "
            f"training.total_steps={n_done} or more"
        )
    momentum = getattr(getattr(stored, "teacher", None), "schedule", "constant")
    if n_done == 0 or (is_same_schedule(now, before, n_done) and momentum == "constant"):
        return
    is_rate = momentum == "constant" or before.schedule != "warmup-stable-decay"
    key = f"training.schedule: {before.schedule}" if is_rate else f"teacher.schedule: {momentum}"
    more = max(now.total_steps - n_done, before.warmup_steps + before.decay_steps, 1)
    raise ValueError(
        f"training.total_steps: {now.total_steps} now, {before.total_steps} in the run (decay_steps {now.decay_steps} "
        f"and {before.decay_steps}): by {key} the {n_done} steps that are done would have been others; go on from its "
        f"weights in a new run: mamo pretrain --config {folder / CONFIG} checkpoint={folder} "
        f"output_dir={folder}-longer training.total_steps={more}"
    )


def resumed_config(present: RunConfig, resolved_file: Path, build: BuildConfig) -> RunConfig:
    """Return the config of the run to continue, with `RESUME_MAY_CHANGE`, `SCHEDULE_KEYS`, `MAY_BE_MOVED` of `present`.

    Raises:
        ValueError: the file is missing, or a key that changes the run differs; all such keys are named.
    """
    if not resolved_file.is_file():
        raise ValueError(f"nothing to resume: {resolved_file} does not exist; start without --resume")
    stored = build(read_values(resolved_file), str(resolved_file))
    present, _ = with_conventions(present, conventions_of(stored))
    old, new = flatten(stored.model_dump()), flatten(present.model_dump())
    for key in AUTO_KEYS:
        if new[key] == "auto":
            new[key] = old[key]
    differing = [
        key
        for key in new
        if new[key] != old.get(key)
        and not key.startswith(RESUME_MAY_CHANGE)
        and key not in (*SCHEDULE_KEYS, *MAY_BE_MOVED)
    ]
    if differing:
        lines = [f"  {key}: {old.get(key)} in the run, {new[key]} now" for key in differing]
        raise ValueError("--resume with another config than the run's:\n" + "\n".join(lines))
    refuse_another_schedule(present, stored, resolved_file.parent)
    merged, now = stored.model_dump(), present.model_dump()
    for key in (*RESUME_MAY_CHANGE, *SCHEDULE_KEYS, *MAY_BE_MOVED):
        section, _, name = key.rstrip(".").partition(".")
        if name:
            merged[section][name] = now[section][name]
        else:
            merged[section] = now[section]
    return build(merged, str(resolved_file))
