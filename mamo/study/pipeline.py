"""Run the full pipeline on the embedded world: pre-train, fine-tune five tasks (also from random weights), tabulate."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mamo.config.schema import RunConfig
from mamo.evaluation.protocols import EVALUATION_KEYS
from mamo.evaluator import evaluate
from mamo.tasks.registry import build_config, finetune_config, load_config
from mamo.trainer import refuse_another_evaluation, train
from mamo.training.checkpoint import step_folders
from mamo.training.resume import resumed_config
from mamo.training.run_dir import CONFIG, atomic_write_text, read_evaluations

logger = logging.getLogger(__name__)

PRETRAINING = "pretraining"
ZERO_SHOT = "zero-shot"
FROM_SCRATCH = "from-scratch"
TABLE = "table.md"


@dataclass(frozen=True, slots=True)
class Row:
    """Metrics of one task in the table, their target and their baselines."""

    task: str
    """Name of the fine-tuning's config, without `_scenes`, and of its run folder."""
    metrics: tuple[str, ...]
    target: float
    baselines: tuple[str, ...]
    """Further metrics of the fine-tuned run: trivial baselines and upper bounds."""
    zero_shot: str | None = None
    """Protocol that evaluates the pre-trained checkpoint on the same data."""


ROWS = (
    Row("retrieval", ("rerank/i2t_r1", "rerank/t2i_r1"), 90.0, ("itc/i2t_r1", "itc/t2i_r1"), "scenes-full-retrieval"),
    Row("vqa", ("vqa/accuracy",), 80.0, ("question_only/accuracy",)),
    Row("nlvr2", ("reasoning/accuracy",), 75.0, ("reasoning/majority",)),
    Row("entailment", ("entailment/accuracy",), 85.0, ("entailment/majority", "text_only/accuracy")),
    Row(
        "grounding",
        ("grounding/proposal",),
        75.0,
        ("grounding/random_proposal", "grounding/upper_bound"),
        "scenes-full-grounding",
    ),
)
ERRORS_TO_REMOVE = 25.0
"""Target: percent of the errors of training from random weights that pre-training removes."""


def run_pipeline(
    folder: Path, pretraining: Path, finetuning: Path, overrides: Sequence[str], rows: Sequence[Row] = ROWS
) -> str:
    """Run the unfinished stages, resume interrupted ones, and write the table.

    Args:
        folder: gets one run folder per stage, `table.md` and `results.json`.
        pretraining: config of the pre-training.
        finetuning: folder of `TASK_scenes.yaml`.
        overrides: `section.key=value` for every training.
        rows: the tasks.

    Returns:
        The table in Markdown.

    Raises:
        ValueError: as `train`; also where a finished stage has a different config.
    """
    source = folder / PRETRAINING
    stage(load_config(pretraining, [*overrides, f"output_dir={source}"]))
    results: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.zero_shot is not None:
            output = folder / ZERO_SHOT / row.task
            if not read_evaluations(output):
                limits = [override for override in overrides if override.partition("=")[0] in EVALUATION_KEYS]
                evaluate(source, row.zero_shot, limits, output)
            results[f"{row.task}/{ZERO_SHOT}"] = metrics_of(output)
        for name, more in ((row.task, []), (f"{row.task}-{FROM_SCRATCH}", ["from_scratch=true"])):
            output = folder / name
            applied = [*overrides, f"checkpoint={source}", f"output_dir={output}", *more]
            is_begun = (output / CONFIG).is_file()
            stage(finetune_config(finetuning / f"{row.task}_scenes.yaml", applied, is_begun))
            results[name] = metrics_of(output)
    table = table_of(results, rows)
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(folder / TABLE, table)
    return table


def stage(config: RunConfig) -> None:
    """Train unless finished; resume where the folder holds a config.

    Raises:
        ValueError: as `train`; also where a finished run has a different config.
    """
    folder = Path(config.output_dir)
    evaluations = read_evaluations(folder)
    if evaluations and evaluations[-1]["step"] == config.training.total_steps and step_folders(folder):
        merged = resumed_config(config, folder / CONFIG, build_config)
        refuse_another_evaluation(merged, config.training.total_steps)
        logger.info("%s is finished", folder)
        return
    train(config, (folder / CONFIG).is_file())


def metrics_of(folder: Path) -> dict[str, float]:
    """Return the metrics of the last evaluation in a folder."""
    metrics: dict[str, float] = read_evaluations(folder)[-1]["metrics"]
    return metrics


def errors_removed(fine_tuned: float, from_scratch: float) -> float:
    """Return the percent of the from-scratch errors that are gone; arguments in percent right. Zero without errors."""
    return 100.0 * (fine_tuned - from_scratch) / (100.0 - from_scratch) if from_scratch < 100.0 else 0.0


def table_of(results: Mapping[str, Mapping[str, float]], rows: Sequence[Row]) -> str:
    """Format one Markdown line per metric: target, results, and baselines."""
    head = ("task", "metric", "aim", "fine-tuned", "from scratch", f"errors removed (aim {ERRORS_TO_REMOVE:.0f} %)")
    lines: list[tuple[str, ...]] = [(*head, "zero-shot", "beside it"), ("---",) * 8]
    for row in rows:
        tuned, scratch = results[row.task], results[f"{row.task}-{FROM_SCRATCH}"]
        zero_shot = results.get(f"{row.task}/{ZERO_SHOT}", {})
        baselines = ", ".join(f"`{name}` {tuned[name]:.1f}" for name in row.baselines)
        for metric in row.metrics:
            removed = errors_removed(tuned[metric], scratch[metric])
            numbers: list[object] = [row.target, tuned[metric], scratch[metric], removed]
            shown = [f"{number:.1f}" for number in numbers]
            before = f"{zero_shot[metric]:.1f}" if metric in zero_shot else "—"
            lines.append((row.task, f"`{metric}`", *shown, before, baselines))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
