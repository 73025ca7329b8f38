"""A checkpoint under a named protocol, read from its folder."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mamo.config.schema import RunConfig
from mamo.config.shipped import is_shipped_network
from mamo.config.values import Values, apply_override, read_values
from mamo.data.processor import has_sep
from mamo.data.tokenizer import add_mask_token, read_tokenizer
from mamo.distributed import map_over_ranks
from mamo.evaluation.fine_grained import SCORE_STATES, SETS, describe_scores, find_set, places
from mamo.evaluation.items import is_whole, metrics_of_set
from mamo.evaluation.predictor import Predictor
from mamo.evaluation.protocols import (
    CUSTOM,
    FINE_GRAINED,
    apply_protocol,
    check_lineage,
    check_overrides,
    has_own_inputs,
    protocol_name,
)
from mamo.evaluation.results import Metrics, facts_of, result_entry
from mamo.imports import no_code_from
from mamo.models.image_encoder import choose_attention
from mamo.reports.card import model_card
from mamo.reports.page import write_report
from mamo.tasks.base import Task
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
"""Fields of an entry; an evaluation replaces the entry that agrees in all of them, and in the files of items."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint under a protocol: its task and predictor, and what an entry of `results.json` names."""

    folder: Path
    config: RunConfig
    trained_on: RunConfig
    name: str
    has_own_inputs: bool
    task: Task
    predictor: Predictor
    earlier: list[Values]
    own: Values

    @property
    def evaluations(self) -> Path:
        """Return the folder of the evaluations: in the run, of a shipped network in the current directory."""
        if is_shipped_network(self.folder):
            return Path(checkpoint.EVALUATIONS) / self.folder.name
        return checkpoint.run_folder(self.folder) / checkpoint.EVALUATIONS

    @contextmanager
    def in_precision(self) -> Iterator[None]:
        """Cast the weights as the config says."""
        chosen = self.config.training.precision
        precision: Precision = "fp32" if chosen == "auto" else chosen
        choose_attention(self.predictor.network, self.predictor.device, precision)
        with memory_errors(self.config), cast_parameters(precision, [self.predictor.network]):
            yield

    def entry(self, name: str, scorer: str, metrics: dict[str, float]) -> Values:
        """Return an entry of `results.json`."""
        entry = result_entry(self.config, name, scorer, self.folder, self.own["step"], self.earlier, metrics)
        if "items" in entry:
            links = [*self.earlier, self.own]
            entry["trained_on"] = [" + ".join(link.get("data_sets", [])) or "unknown data" for link in links]
        return entry

    def write_page(self, to: Path, title: str, metrics: dict[str, float], pictures: int) -> None:
        """Write `report.html` with `pictures` rows of each kind."""
        shown = self.task.report(self.predictor, pictures, to)
        card = model_card(self.folder, self.trained_on)
        files = self.config.data.eval_names
        write_report(to, f"{title} of {self.folder}", metrics, shown, self.folder, card, facts_of(metrics), files)


def restore(path: Path, protocol: str, overrides: Sequence[str]) -> Restored:
    """Restore a checkpoint with the config of a protocol.

    Args:
        path: a run or step folder.
        protocol: a name of `PROTOCOLS`.
        overrides: `section.key=value` over the protocol.

    Raises:
        ValueError: as `evaluate`.
    """
    folder = checkpoint.resolve(path)
    *earlier, own = read_lineage(folder)
    stored = read_values(folder / CONFIG)
    values = apply_protocol(protocol, stored, is_same_network)
    values.get("training", {}).pop("keep_best", None)  # it compares the evaluations of a training
    values["checkpoint"] = str(folder)
    with no_code_from(folder):
        trained_on = build_config(stored, str(folder / CONFIG))
        check_overrides(protocol, overrides, trained_on.model_dump())
        before = copy.deepcopy(values)
        for override in overrides:
            apply_override(values, override)
        config = build_config(values, f"{folder / CONFIG} under {protocol}")
    is_own = has_own_inputs(before, values)
    suffix = protocol_name(protocol, config, is_own).removeprefix(protocol)
    name = check_lineage(protocol, [*earlier, own]) + suffix
    words = _tokenizer(folder, config) if config.data.tokenizer != before["data"]["tokenizer"] else None
    task, predictor = restore_task(folder, config, choose_device("auto"), words=words)
    for _ in task.each_eval_file():
        task.check_held_out(trained_on.data.train_files)
    refuse_training_files(config.data, [trained_on.data.model_dump(), *trained_data(earlier)])
    return Restored(folder, config, trained_on, name, is_own, task, predictor, earlier, own)


def evaluate(
    path: Path, protocol: str, overrides: Sequence[str], output_dir: Path | None = None, pictures: int = 0
) -> Values:
    """Evaluate a checkpoint and write `results.json`; the processes of a group share the work, the first one writes.

    Args:
        path: a run or step folder.
        protocol: a name of `PROTOCOLS`.
        overrides: `section.key=value` over the protocol; a change of what it fixes, or of the network's inputs, shows
            in the entry's name.
        output_dir: where to write; None is `evaluations/PROTOCOL` in the run, of a shipped network
            `evaluations/NAME/PROTOCOL`. Evaluations of other steps, files or settings that its `results.json` holds
            are kept.
        pictures: rows of each kind of picture in `report.html`; 0 writes none.

    Returns:
        The entry that was written.

    Raises:
        ValueError: an unknown protocol; an override of the network, of the task or of what an evaluation does not
            read; a missing or damaged checkpoint; unreadable data; `output_dir` is a run's folder.
    """
    restored = restore(path, protocol, overrides)
    output_dir = output_dir or restored.evaluations / protocol
    (others,) = map_over_ranks(_prepare, [output_dir])
    with restored.in_precision():
        task, name = restored.task, restored.name
        metrics = task.evaluate_files(restored.predictor, output_dir)
        scorer = task.describe_scorer()
        if restored.config.evaluation.items_files:
            items = task.evaluate_items(restored.predictor, output_dir)
            metrics = Metrics(metrics, facts_of(metrics)) | items
            scorer = describe_scores(restored.config.evaluation.items_scores)
            if not is_whole(items) and not name.endswith(CUSTOM):
                name += CUSTOM
        entry = restored.entry(name, scorer, metrics)

        def write(to: Path) -> None:
            _write_entries(to, others, [entry])
            if pictures:
                restored.write_page(to, entry["protocol"], metrics, pictures)

        map_over_ranks(write, [output_dir])  # on rank 0
    return entry


def evaluate_fine_grained(
    path: Path, root: Path, overrides: Sequence[str], output_dir: Path | None = None, pictures: int = 0
) -> list[Values]:
    """Score every published set that lies below `root`, by every score, and write `results.json`.

    The pairs of an item are scored once for all scores. Each set and score has an entry under its own protocol.

    Args:
        path: a run or step folder.
        root: folder of data sets (`mamo data build NAME --to ROOT/NAME`).
        overrides: `section.key=value`, as of `evaluate`.
        output_dir: where to write; None is `evaluations/fine-grained` in the run.
        pictures: as of `evaluate`.

    Returns:
        The entries that were written.

    Raises:
        ValueError: as `evaluate`; no set lies below `root`.
    """
    files = {name: file for name in SETS if (file := find_set(root, name)) is not None}
    if not files:
        raise ValueError(
            f"data.root: {root} contains no published set, such as {places(root, 'sugarcrepe')[0]}; build one with "
            "`mamo data build`"
        )
    listed = f"evaluation.items_files=[{', '.join(json.dumps(str(file)) for file in files.values())}]"
    scores = f"evaluation.items_scores={json.dumps(list(SCORE_STATES))}"
    restored = restore(path, "items-itm", [listed, scores, *overrides])
    output_dir = output_dir or restored.evaluations / FINE_GRAINED
    (others,) = map_over_ranks(_prepare, [output_dir])
    with restored.in_precision():
        metrics = restored.task.evaluate_items(restored.predictor, output_dir)
        entries = []
        for name, fixed in SETS.items():
            for score in fixed.scores if name in files else ():
                own = metrics_of_set(metrics, name, score)
                if own:
                    has_all = is_whole(own) and fixed.n_items in (None, own.files[name]["items"])
                    suffix = "" if has_all and restored.has_own_inputs else CUSTOM
                    entries.append(restored.entry(f"{name}-{score}{suffix}", describe_scores([score]), own))

        if not entries:
            raise ValueError(f"{restored.folder}: has no head that scores {', '.join(files)}; ITM or ITC is needed")

        def write(to: Path) -> None:
            _write_entries(to, others, entries)
            if pictures:
                restored.write_page(to, FINE_GRAINED, metrics, pictures)

        map_over_ranks(write, [output_dir])  # on rank 0
    return entries


def _write_entries(to: Path, others: list[Values], entries: list[Values]) -> None:
    """Write `results.json` with the new entries, and the others that differ from each in what identifies them."""
    same = list(map(_identity, entries))
    kept = [other for other in others if _identity(other) not in same]
    atomic_write_text(to / RESULTS, json.dumps({"evaluations": [*kept, *entries]}, indent=1) + "\n")


def _identity(entry: Values) -> list[Any]:
    digests = {name: file["sha256"] for name, file in entry.get("items", {}).items()}
    return [*(entry.get(key) for key in _IDENTITY), digests]


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
    words, stored = load_tokenizer(name, has_sep(config)), read_tokenizer(str(folder / "tokenizer"))
    if stored.mask_token is not None:
        add_mask_token(words)
    if words.get_vocab() != stored.get_vocab():
        raise ValueError(
            f"data.tokenizer: {name} has another vocabulary than {folder / 'tokenizer'}, which the network was trained "
            "with; remove it"
        )
    return words
