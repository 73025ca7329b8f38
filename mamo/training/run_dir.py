"""Files of a run other than checkpoints: config, metrics, timing, TensorBoard events, results, curves."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import yaml
from torch.utils.tensorboard import SummaryWriter

from mamo.config.schema import RunConfig
from mamo.config.values import Values

logger = logging.getLogger(__name__)

METRICS, TIMING, RESULTS, CONFIG, CURVES, STATEMENT_SCORES = (
    "metrics.jsonl",
    "timing.jsonl",
    "results.json",
    "config.yaml",
    "curves.png",
    "statement_scores.jsonl",
)
BERT = "bert"
"""Folder in a run and in each of its checkpoints: the configuration of the BERT named by `model.text.bert`."""


@contextlib.contextmanager
def add_path_to_oserror(path: Path) -> Iterator[None]:
    """Add the path to an `OSError` (a disk-full error has none)."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


class Tracker(Protocol):
    """Interface of an experiment tracker: `mamo.trainer.train(config, False, trackers=[...])`.

    TensorBoard is one. Any object with these two methods works; it is called only on rank 0.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step by name: `loss/itc`, `samples_per_s`, `evaluation/itc/i2t_r1` and the like."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class TensorBoardTracker:
    """Write scalars for TensorBoard; events that an interrupted run wrote after `first_step` are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder = folder
        with add_path_to_oserror(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""
        with add_path_to_oserror(self.folder):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        with add_path_to_oserror(self.folder):
            self.writer.close()


def make_folder(output_dir: Path) -> None:
    """Create the folder and its parents. Raises ValueError if it cannot be created."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written: {error.strerror}") from None


def create_output_dir(output_dir: Path) -> None:
    """Create the folder of a new run.

    Raises:
        ValueError: it is not empty, or cannot be written.
    """
    make_folder(output_dir)
    try:
        # a start that was killed early may leave hidden files
        if any(not path.name.startswith(".") for path in output_dir.iterdir()):
            raise ValueError(
                f"output_dir {output_dir} is not empty: continue that run with --resume, or choose another output_dir"
            )
        probe = output_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written: {error.strerror}") from None


def truncate_jsonl(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a last line that a kill cut off; log how many.

    Raises:
        ValueError: another line is no object with a `step`; the file is untouched.
    """
    if not path.exists():
        return
    with add_path_to_oserror(path):
        content = path.read_bytes()
    *lines, last = content.split(b"\n")
    rows = [_jsonl_row(line, path, number) for number, line in enumerate(lines, start=1)]
    kept = [line + b"\n" for line, row in zip(lines, rows) if row["step"] <= step]
    if len(kept) < len(lines):
        logger.info("%s: removing %d lines after step %d, which is resumed", path, len(lines) - len(kept), step)
    if last:  # not ended by a line break
        try:
            is_kept = _jsonl_row(last, path, len(lines) + 1)["step"] <= step
        except ValueError:
            is_kept = False
            logger.warning("%s: removing the last line (%d), which was cut off: %.60r", path, len(lines) + 1, last)
        kept += [last + b"\n"] if is_kept else []
    if b"".join(kept) != content:
        atomic_write_bytes(path, b"".join(kept))


def _jsonl_row(line: bytes, path: Path, number: int) -> Values:
    """Return the object of a line of metrics. Raises ValueError naming file and line."""
    try:
        row = json.loads(line.decode("utf-8"))
        if isinstance(row, dict) and type(row["step"]) is int:
            return row
    except (ValueError, KeyError, RecursionError):
        pass
    raise ValueError(
        f"{path}, line {number}: not a JSON object with a whole number `step`: {line[:40]!r}. Repair or remove the line"
    )


def read_jsonl(path: Path) -> list[Values]:
    """Read the objects of `metrics.jsonl` or `timing.jsonl`. Raises ValueError naming file and line."""
    lines = path.read_bytes().splitlines()
    return [_jsonl_row(line, path, number) for number, line in enumerate(lines, start=1)]


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.writing")
    with add_path_to_oserror(path):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def dump(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def write_config(output_dir: Path, config: RunConfig) -> None:
    """Write the resolved `config.yaml`; after it the folder holds a run that can be resumed."""
    temporary = output_dir / f".{CONFIG}.writing"
    with add_path_to_oserror(output_dir / CONFIG):
        dump(config, temporary)
        temporary.replace(output_dir / CONFIG)


def read_evaluations(output_dir: Path) -> list[Values]:
    """Read the evaluations in `results.json`; none if there is no file. Raises ValueError naming a damaged file."""
    path = output_dir / RESULTS
    if not path.exists():
        return []
    try:
        evaluations = json.loads(path.read_text("utf-8"))["evaluations"]
        is_valid = isinstance(evaluations, list) and all(
            type(entry.get("step")) is int or str(entry["protocol"]).endswith("-folds") for entry in evaluations
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{path} is not a valid results.json: it needs a list `evaluations` of objects with a whole number `step`. "
            "Delete it to continue; its evaluations are lost"
        )
    return cast(list[Values], evaluations)


def write_evaluations(output_dir: Path, evaluations: list[Values]) -> None:
    """Write `results.json`."""
    atomic_write_text(output_dir / RESULTS, json.dumps({"evaluations": evaluations}, indent=1) + "\n")


class JsonlWriter:
    """Append one JSON object per line; line buffering passes each line to the operating system before the next step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, object]) -> None:
        """Append one object."""
        with add_path_to_oserror(self.path):
            self.file.write(json.dumps(values) + "\n")

    def flush_to_disk(self) -> None:
        """Sync the lines to disk, so that a checkpoint never exists without them, even after a power cut."""
        with add_path_to_oserror(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # already raised by `write`
            self.file.close()


def check_trackers(trackers: object) -> None:
    """Raise ValueError unless this is a list or tuple of objects with the methods of `Tracker`."""
    if not isinstance(trackers, list | tuple):
        kind = trackers.__name__ if isinstance(trackers, type) else type(trackers).__name__
        raise ValueError(f"trackers: pass a list of objects with `log` and `close`, not {kind}")
    for number, tracker in enumerate(trackers):
        if isinstance(tracker, type):
            raise ValueError(f"trackers: number {number} is the class {tracker.__name__}; pass an object of it")
        lacking = [name for name in ("log", "close") if not callable(getattr(tracker, name, None))]
        if lacking:
            raise ValueError(f"trackers: number {number}, {type(tracker).__name__}, has no method {lacking[0]}")


def log_to(trackers: list[Tracker], step: int, values: Mapping[str, float]) -> None:
    """Pass a step's values to each tracker; remove one of the caller's own that raises, with a warning."""
    for tracker in list(trackers):
        try:
            tracker.log(step, dict(values))
        except Exception as error:
            if isinstance(tracker, TensorBoardTracker):
                raise
            warn_of_tracker(type(tracker).__name__, error, f"at step {step}; it gets no further steps")
            trackers[:] = [other for other in trackers if other is not tracker]
            with contextlib.suppress(Exception):
                tracker.close()


def close(trackers: Sequence[Tracker]) -> None:
    """Close each tracker; one of the caller's own that raises is a warning."""
    for tracker in trackers:
        try:
            tracker.close()
        except Exception as error:
            if isinstance(tracker, TensorBoardTracker):
                raise
            warn_of_tracker(type(tracker).__name__, error, "at its end")


def warn_of_tracker(name: str, error: Exception, when: str) -> None:
    """Log in one line that a tracker failed."""
    reason = " ".join(f"{type(error).__name__} {error}".split())
    logger.warning("the tracker %s failed %s: %.300s", name, when, reason)


def sha256_hex(texts: Iterable[str]) -> str:
    """Return the SHA-256 of the concatenated texts in hex digits."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "replace"))
    return found.hexdigest()
