"""Read a study's file: the variants of a base config and the comparisons, both fixed before it runs.

```yaml
question: the question of the study
base: base_scenes.yaml               # a training config; the path is relative to the study's file
finetune: base_matching.yaml         # optional: fine-tunes each run with this config; `finetune.KEY` overrides it
variants:                            # name -> overrides of the base ...
  mlm_only: {losses.weights.mim: 0}
  all: {}
grid:                                # ... or every combination of these values, which name the variants
  masking.image_ratio: [0.5, 0.75]
baseline: all
metrics: [probe/attribute_swap/itm]  # names in `results.json`, the decisive one first
comparisons: [{variant: mlm_only, against: all, question: what MIM adds}]
smallest_difference: 3               # optional: of interest, in points of the first metric; the half width to reach
explore_seeds: [0, 1, 2, 3, 4]
confirm_seeds: [5, 6, 7, 8, 9]
```
"""

import copy
import datetime
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mamo.config.load import explain
from mamo.config.schema import RunConfig, Section
from mamo.config.unused import non_defaults
from mamo.config.values import Values, apply_override, read_values
from mamo.tasks.registry import CONFIG_TYPES, build_config
from mamo.training.resume import inherit_from_checkpoint

SeedSet = Literal["explore", "confirm", "all"]
Name = Annotated[str, Field(pattern=r"^[\w.+=, -]+$")]
Overrides = Values
_FINETUNE = "finetune."
_SET_BY_STUDY = ("seed", "output_dir", "finetune.seed", "finetune.output_dir", "finetune.checkpoint")
_CHANGES_NO_RESULT = (
    "output_dir", "data.workers", "training.checkpoint_every_steps", "training.checkpoints_kept", "training.keep_best",
    "logging.trackers", "logging.project",
)  # fmt: skip


class Comparison(Section):
    """A planned difference, `variant` minus `against`, paired by seed."""

    variant: str
    against: str
    question: str


class StudyFile(Section):
    """Keys of a study's file."""

    question: str
    base: str
    finetune: str | None = None
    variants: dict[Name, Overrides] = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    baseline: str
    metrics: Annotated[list[str], Field(min_length=1)]
    comparisons: list[Comparison] = Field(default_factory=list)
    smallest_difference: Annotated[float, Field(gt=0)] | None = None
    explore_seeds: Annotated[list[int], Field(min_length=1)]
    confirm_seeds: list[int] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trial:
    """A training run: a variant under one seed. Trials of one `config_hash` share one run, across studies."""

    variant: str
    seed: int
    file: Path
    """The config file to which `overrides` apply."""
    overrides: tuple[str, ...]
    config: RunConfig
    """In a fine-tuning, `checkpoint` holds the config hash of its pre-training."""
    config_hash: str
    pretraining: "Trial | None" = None
    """The run from which a fine-tuning starts; fine-tunings of one pre-training share it."""


@dataclass(frozen=True, slots=True)
class Study:
    """A validated study."""

    name: str
    file: StudyFile
    variants: dict[str, Overrides]
    all_trials: tuple[Trial, ...]
    """Variants times seeds, ordered by seed, so that an interrupted study has complete pairs."""

    def seeds(self, chosen: SeedSet) -> list[int]:
        """List the seeds of a set, in the order of the file."""
        sets = {"explore": self.file.explore_seeds, "confirm": self.file.confirm_seeds}
        return [*sets["explore"], *sets["confirm"]] if chosen == "all" else sets[chosen]

    def trials(self, chosen: SeedSet) -> list[Trial]:
        """List the trials of a set of seeds."""
        seeds = set(self.seeds(chosen))
        return [trial for trial in self.all_trials if trial.seed in seeds]

    def trial(self, variant: str, seed: int) -> Trial:
        """Return the trial of one variant and seed."""
        return next(trial for trial in self.all_trials if (trial.variant, trial.seed) == (variant, seed))


def read_study(path: Path, common: Sequence[str] = ()) -> Study:
    """Read a study's file; `common` are `section.key=value` overrides of its base (of its fine-tuning: `finetune.`).

    Raises:
        ValueError: one message naming the file and every problem with its key; or that of the first invalid variant.
    """
    values = read_values(path)
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise _refusal(path, [line for problem in error.errors() for line in explain(problem, StudyFile)]) from None
    variants = dict(file.variants) or dict(_combinations(file.grid))
    problems = list(_contradictions(file, variants))
    if problems:
        raise _refusal(path, problems)
    names = [file.base] if file.finetune is None else [file.base, file.finetune]
    stages = [(path.parent / name, read_values(path.parent / name)) for name in names]
    trials = [
        _trial(name, (*common, *(f"{key}={json.dumps(value)}" for key, value in overrides.items())), seed, stages)
        for seed in (*file.explore_seeds, *file.confirm_seeds)
        for name, overrides in variants.items()
    ]
    problems = [
        f"variants.{trial.variant}: evaluation.enabled is false, so a trial has no results; set it to true in "
        f"{trial.file.name} or the variant"
        for trial in trials
        if trial.seed == file.explore_seeds[0] and not trial.config.evaluation.enabled
    ]
    if problems:
        raise _refusal(path, problems)
    return Study(path.stem, file, variants, tuple(trials))


def _trial(variant: str, overrides: Sequence[str], seed: int, stages: Sequence[tuple[Path, Values]]) -> Trial:
    """Build the trial of the last stage, with the trial of the stage before it as `pretraining`."""
    of_second = [word.removeprefix(_FINETUNE) for word in overrides if len(stages) > 1 and word.startswith(_FINETUNE)]
    of_first = [word for word in overrides if len(stages) == 1 or not word.startswith(_FINETUNE)]
    before: Trial | None = None
    for (file, stored), words in zip(stages, (of_first, of_second)):
        applied = (*words, f"seed={seed}")
        values = copy.deepcopy(stored)
        for override in applied:
            apply_override(values, override)
        origin = f"{file}, variant {variant}"
        if before is None:
            config = build_config(values, origin)
        else:
            values["checkpoint"] = before.config_hash
            stored, tokenizer = before.config.model_dump(), before.config.data.tokenizer
            config = inherit_from_checkpoint(values, stored, tokenizer, origin, build_config)
        before = Trial(variant, seed, file, applied, config, config_hash(config), before)
    assert before is not None
    return before


def changed_settings(config: RunConfig) -> Values:
    """Return the settings that are not at their default, by section.

    Keys of other tasks count with the value at which they change nothing, such as a preset's sizes of an image encoder
    that MLIM does not have. So neither a new key nor one that leaves a task's type changes the hash of finished trials.
    """
    return non_defaults(config, CONFIG_TYPES)


def config_hash(config: RunConfig) -> str:
    """Return 12 hex digits of `changed_settings` without those that change no result."""
    values = changed_settings(config)
    for dotted in _CHANGES_NO_RESULT:
        *sections, leaf = dotted.split(".")
        inner = values
        for section in sections:
            inner = inner.get(section, {})
        inner.pop(leaf, None)
    values = {key: value for key, value in values.items() if value != {}}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _combinations(grid: dict[str, list[Any]]) -> Iterator[tuple[str, Overrides]]:
    for values in itertools.product(*grid.values()) if grid else ():
        chosen = dict(zip(grid, values))
        yield ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in chosen.items()), chosen


def _contradictions(file: StudyFile, variants: dict[str, Overrides]) -> Iterator[str]:
    if bool(file.variants) == bool(file.grid):
        yield "variants, grid: set exactly one of the two"
    names = [("baseline", file.baseline)]
    for number, comparison in enumerate(file.comparisons):
        names += [(f"comparisons.{number}.variant", comparison.variant)]
        names += [(f"comparisons.{number}.against", comparison.against)]
    for key, name in names:
        if name not in variants:
            yield f"{key}: no variant {name!r}; variants: {', '.join(variants)}"
    seeds = [*file.explore_seeds, *file.confirm_seeds]
    if len(set(seeds)) < len(seeds):
        yield "explore_seeds, confirm_seeds: a seed occurs twice"
    for name, overrides in variants.items():
        for key in _SET_BY_STUDY:
            if key in overrides:
                yield f"variants.{name}.{key}: set by the study itself; remove it"
        for key, value in overrides.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):  # a date, bytes or a set of YAML, or no finite number
                kind = "date" if isinstance(value, datetime.date) else type(value).__name__
                yield f"variants.{name}.{key}: not a value of a config (found {value!r:.60}, a {kind}); quote a text"


def _refusal(path: Path, problems: list[str]) -> ValueError:
    return ValueError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
