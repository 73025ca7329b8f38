"""A checkpoint under a named protocol, read from its folder."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mamo.config.schema import RunConfig
from mamo.config.values import Values, apply_override, read_values
from mamo.data.processor import has_sep
from mamo.data.tokenizer import read_tokenizer
from mamo.distributed import map_over_ranks
from mamo.evaluation.protocols import (
    apply_protocol,
    check_lineage,
    check_overrides,
    has_own_inputs,
    protocol_name,
)
from mamo.evaluation.results import result_entry
from mamo.imports import no_code_from
from mamo.models.image_encoder import choose_attention
from mamo.reports.card import model_card
from mamo.reports.page import write_report
from mamo.tasks.registry import build_config, is_same_network
from mamo.tasks.restore import restore_task
from mamo.tasks.sources import load_tokenizer, refuse_training_files
from mamo.training import checkpoint
from mamo.training.memory import memory_errors
from mamo.training.precision import Precision, cast_parameters, choose_device
from mamo.training.resume import read_lineage, trained_data
from mamo.training.run_dir import CONFIG, RESULTS, atomic_write_text, read_evaluations

_IDENTITY = (
    "protocol", "split", "checkpoint", "step", "eval_file", "eval_split", "statements_file", "rerank_k",
    "image_size_px", "text_max_tokens", "precision",
)  # fmt: skip
"""Fields of an entry; an evaluation replaces the entry that agrees in all of them."""


def evaluate(
    path: Path, protocol: str, overrides: Sequence[str], output_dir: Path | None = None, pictures: int = 0
) -> Values:
    """Evaluate a checkpoint and write `results.json`; the processes of a group share the work, the first one writes.

    Args:
        path: a run or step folder.
        protocol: a name of `PROTOCOLS`.
        overrides: `section.key=value` over the protocol; a change of what it fixes, or of the network's inputs, shows
            in the entry's name.
        output_dir: where to write; None is `evaluations/PROTOCOL` in the run. Evaluations of other steps, files
            or settings that its `results.json` holds are kept.
        pictures: rows of each kind of picture in `report.html`; 0 writes none.

    Returns:
        The entry that was written.

    Raises:
        ValueError: an unknown protocol; an override of the network, of the task or of what an evaluation does not
            read; a missing or damaged checkpoint; unreadable data; `output_dir` is a run's folder.
    """
    folder = checkpoint.resolve(path)
    *earlier, own = read_lineage(folder)
    stored = read_values(folder / CONFIG)
    values = apply_protocol(protocol, stored, is_same_network)
    values["checkpoint"] = str(folder)
    with no_code_from(folder):
        trained_on = build_config(stored, str(folder / CONFIG))
        check_overrides(protocol, overrides, trained_on.model_dump())
        before = copy.deepcopy(values)
        for override in overrides:
            apply_override(values, override)
        config = build_config(values, f"{folder / CONFIG} under {protocol}")
    suffix = protocol_name(protocol, config, has_own_inputs(before, values)).removeprefix(protocol)
    name = check_lineage(protocol, [*earlier, own]) + suffix
    words = _tokenizer(folder, config) if config.data.tokenizer != before["data"]["tokenizer"] else None
    task, predictor = restore_task(folder, config, choose_device("auto"), words=words)
    task.check_held_out(trained_on.data.train_files)
    refuse_training_files(config.data, [trained_on.data.model_dump(), *trained_data(earlier)])
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    output_dir = output_dir or run / "evaluations" / protocol
    (others,) = map_over_ranks(_prepare, [output_dir])
    precision: Precision = "fp32" if config.training.precision == "auto" else config.training.precision

    def write(to: Path) -> None:
        kept = [other for other in others if any(other.get(key) != entry[key] for key in _IDENTITY)]
        atomic_write_text(to / RESULTS, json.dumps({"evaluations": [*kept, entry]}, indent=1) + "\n")
        if pictures:
            shown = task.report(predictor, pictures, to)
            card = model_card(folder, trained_on)
            write_report(to, f"{entry['protocol']} of {folder}", metrics, shown, folder, card, entry["facts"])

    choose_attention(predictor.network, predictor.device, precision)
    with memory_errors(config), cast_parameters(precision, [predictor.network]):
        metrics = task.evaluate(predictor, output_dir)
        entry = result_entry(config, name, task.describe_scorer(), folder, own["step"], earlier, metrics)
        map_over_ranks(write, [output_dir])  # on rank 0
    return entry


def _prepare(output_dir: Path) -> list[Values]:
    """Create the folder; return the evaluations that its `results.json` holds.

    Raises:
        ValueError: it is the folder of a run, whose `results.json` is of the training, or holds a damaged one.
        OSError: it cannot be written into.
    """
    if (output_dir / "checkpoints").exists():
        raise ValueError(f"output_dir: {output_dir} is the folder of a run; give another, or none")
    output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output_dir / ".writable", "")  # now: an evaluation may take hours
    (output_dir / ".writable").unlink()
    return read_evaluations(output_dir)


def _tokenizer(folder: Path, config: RunConfig) -> PreTrainedTokenizerFast:
    """Load another tokenizer than the checkpoint's. Raises ValueError where its vocabulary is another."""
    name = config.data.tokenizer
    words = load_tokenizer(name, has_sep(config))
    if words.get_vocab() != read_tokenizer(str(folder / "tokenizer")).get_vocab():
        raise ValueError(
            f"data.tokenizer: {name} has another vocabulary than {folder / 'tokenizer'}, which the network was trained "
            "with; remove it"
        )
    return words
