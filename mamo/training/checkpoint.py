"""Save and load checkpoints: atomic, complete, strict and safe.

A checkpoint is a folder `checkpoints/step-NNNNNNN/` with one safetensors file per module, the optimizer state under the
names of its parameters, the resolved config, the tokenizer, `state.json`, and `manifest.json` with the size and SHA-256
of every other file. It is written under a temporary name, flushed to disk and renamed; the relative symlink
`checkpoints/last` is moved last. If the process is killed at any time, the previous checkpoint stays loadable.

A checkpoint does not depend on the parallel layout: sharded tensors are gathered, and rank 0 writes them whole.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mamo.config.shipped import find_network, networks_hint
from mamo.config.values import Values
from mamo.distributed import is_sharded, rank
from mamo.models.weights import WeightReport, save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_REQUIRED = ("state.json", "student.safetensors")
_READ = (".safetensors", ".json", ".yaml", ".txt")
LAST, BEST = "last", "best"
EVALUATIONS = "evaluations"
"""Folder in a run: the results of `mamo evaluate`, by protocol."""
Resample = Callable[[Tensor], Tensor]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another architecture.

    >>> import mamo
    >>> mamo.load("runs/nowhere/else")
    Traceback (most recent call last):
    mamo.training.checkpoint.CheckpointError: runs/nowhere/else: no such folder; give a run, ...
    """


def step_folder(output_dir: Path, step: int) -> Path:
    """Return `checkpoints/step-NNNNNNN` of a run."""
    return output_dir / "checkpoints" / f"step-{step:07d}"


def step_folders(output_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step-*") if path.is_dir())


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer state as `parameter name/state name` -> tensor."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`. Raises `CheckpointError` unless exactly the trainable parameters have state."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    found = {key.rpartition("/")[0] for key in tensors}
    if found != set(parameters):
        raise CheckpointError(f"optimizer state does not match the network: {_differences(set(parameters), found)}")
    for key, value in tensors.items():
        name, _, state_name = key.rpartition("/")
        parameter = parameters[name]
        if value.ndim > 0 and value.shape != parameter.shape:
            raise CheckpointError(
                f"optimizer state does not match the network: `{key}` is {list(value.shape)}, its parameter "
                f"{list(parameter.shape)}"
            )
        optimizer.state[parameter][state_name] = value.to(parameter.device)  # fused AdamW keeps its step there too


def snapshot(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, dict[str, Tensor]]:
    """Copy the contents of a checkpoint to host memory; training may go on while the copies are written.

    Every rank must call it. On ranks other than 0 the tensors are empty.

    Args:
        modules: by the names of their files.
        optimizer: that of `modules["student"]`.
    """
    tensors: dict[str, dict[str, Tensor]] = {name: _tensors_of(module) for name, module in modules.items()}
    if optimizer is not None:
        tensors["optimizer"] = optimizer_tensors(optimizer, modules["student"])
    copies = {name: {key: _on_host(value) for key, value in values.items()} for name, values in tensors.items()}
    if any(value.is_cuda for values in tensors.values() for value in values.values()):
        torch.cuda.synchronize()  # the copies are under way
    return copies


def _on_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to page-locked memory, to which a GPU copies several times as fast."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    if rank() != 0:
        return torch.empty(0)
    copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
    return copy.copy_(whole.detach(), non_blocking=True)


def save(
    output_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    files: Mapping[str, Path],
    kept: int,
) -> Path:
    """Write `checkpoints/step-NNNNNNN` and point `last` at it; keep the newest `kept`, and the one that `best` names.

    Removes the remains of a killed save and the checkpoints of later steps, which a resumed run skipped as damaged.

    Args:
        tensors: from `snapshot`, written as `NAME.safetensors`.
        state: plain values for `state.json`.
        files: further files and folders to copy, by their name in the checkpoint.

    Raises:
        CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = step_folder(output_dir, step)
    _remove_unfinished(target.parent)
    write_folder(target, tensors, {**state, "step": step}, files)
    for folder in step_folders(output_dir):
        if folder.name > target.name:
            shutil.rmtree(folder)
    settle(output_dir, step, kept)
    return target


def settle(output_dir: Path, step: int, kept: int) -> None:
    """Point `last` at the checkpoint of `step`; of those up to it, keep the newest `kept` and the best.

    A resume calls it too: a kill may have come between a checkpoint and this.
    """
    target = step_folder(output_dir, step)
    _remove_unfinished(target.parent)
    if (target.parent / LAST).resolve() != target.resolve():
        point_at(target, LAST)
    best = (target.parent / BEST).resolve().name
    for folder in [folder for folder in step_folders(output_dir) if folder.name <= target.name][:-kept]:
        if folder.name != best:
            shutil.rmtree(folder)


def _remove_unfinished(folder: Path) -> None:
    """Remove the remains of a killed save."""
    for unfinished in folder.glob(".writing-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for name in (LAST, BEST):
        (folder / f".{name}").unlink(missing_ok=True)


def point_at(target: Path, name: str) -> None:
    """Make `last` or `best` the relative link to a step folder.

    A folder of that name, from a copy that followed links, is removed.
    """
    pointer, fresh, aside = (target.parent / part for part in (name, f".{name}", f".writing-{name}"))
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(target.name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        logger.warning("%s: this file system has no links; it would name %s", pointer, target.name)
        return
    if pointer.is_dir() and not pointer.is_symlink():
        pointer.rename(aside)
    fresh.replace(pointer)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def point_at_best(output_dir: Path, evaluations: Sequence[Values], metric: str) -> None:
    """Point `best` at the saved step with the best value of a metric; the earliest of equal ones.

    Args:
        output_dir: of the run.
        evaluations: entries of its `results.json`, oldest first.
        metric: name in the newest. The lowest value is the best of an error, else the highest.

    Raises:
        ValueError: the newest entry has no such metric.
    """
    newest, sign = evaluations[-1]["metrics"], -1.0 if metric.endswith("/error") else 1.0
    if metric not in newest:
        near = ", ".join(difflib.get_close_matches(metric, newest, n=3) or newest)
        raise ValueError(f"training.keep_best: the evaluation has no {metric!r}, but {near}; resume with one of them")
    values: dict[Path, float] = {}
    for entry in evaluations:
        folder = step_folder(output_dir, entry["step"])
        if metric in entry["metrics"] and folder.is_dir():
            values[folder] = sign * entry["metrics"][metric]
    point_at(max(values, key=lambda folder: values[folder]), BEST)


def restore_step_folder(output_dir: Path) -> None:
    """Give a folder `last`, which a copy that followed links left, the name of its step, unless that step is there."""
    last = output_dir / "checkpoints" / LAST
    if last.is_symlink() or not last.is_dir() or not _is_good(last):
        return
    target = step_folder(output_dir, read_state(last)["step"])
    if target.is_dir() and not _is_good(target):
        shutil.rmtree(target)
    if not target.exists():
        last.rename(target)


def write_folder(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, object], files: Mapping[str, Path]
) -> None:
    """Write a checkpoint folder so that it appears under its name complete or not at all.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    temporary, aside = (target.parent / f".writing-{kind}{target.name}" for kind in ("", "old-"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, tensors, state, files)
        if target.exists():  # the same step again, after a resume; a kill leaves the old or the new folder
            target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target} cannot be written: {error}. Earlier checkpoints are untouched") from error


def _write_files(
    temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, object], files: Mapping[str, Path]
) -> None:
    for name, values in tensors.items():
        save_file(dict(values), temporary / f"{name}.safetensors")
    for name, source in files.items():
        if source.is_dir():
            shutil.copytree(source, temporary / name)
        else:
            shutil.copyfile(source, temporary / name)
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    entries = {
        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(temporary.rglob("*"))
        if path.is_file()
    }
    (temporary / MANIFEST).write_text(json.dumps(entries, indent=1))
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)


def verify(folder: Path) -> None:
    """Raise `CheckpointError`, naming the file, unless the files are those of the manifest, all of them unchanged.

    The manifest lists `_REQUIRED` at least, and every file of a kind that is read (`_READ`).
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: not a complete checkpoint ({MANIFEST} is missing or unreadable)") from None
    present = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in _READ and path.is_file()]
    listed = {str(path) for path in present if path.parts[0] != EVALUATIONS}  # written into a copy outside of a run
    for name in sorted({*_REQUIRED, *listed} - {MANIFEST, *expected}):
        raise CheckpointError(f"{folder}: damaged checkpoint, {MANIFEST} does not list {name}")
    for name, (n_bytes, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: damaged checkpoint, {name} is missing")
        if path.stat().st_size != n_bytes:
            raise CheckpointError(
                f"{folder}: damaged checkpoint, {name} has {path.stat().st_size} bytes instead of {n_bytes}"
            )
        if _sha256(path) != digest:
            raise CheckpointError(f"{folder}: damaged checkpoint, the content of {name} has changed")


def last_good(output_dir: Path) -> Path:
    """Return the newest undamaged checkpoint of a run; log each damaged one that is skipped.

    Raises:
        CheckpointError: there is none.
    """
    found = {folder.name: folder for folder in step_folders(output_dir)}
    last = output_dir / "checkpoints" / LAST
    if last.is_dir() and not last.is_symlink():  # a copy that followed links; its step counts, and its step folder's
        with contextlib.suppress(CheckpointError):
            found[f"{step_folder(output_dir, read_state(last)['step']).name} copied"] = last
    for _, folder in sorted(found.items(), reverse=True):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            logger.warning("%s; trying the previous checkpoint", error)
    raise CheckpointError(f"{output_dir}: no undamaged checkpoint to resume from; start over in an empty output_dir")


def resolve(path: Path) -> Path:
    """Return the verified step folder of a run folder, a step folder, or a shipped network (`find_network`).

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the newest undamaged one.
    """
    path = find_network(path)
    run = path.parent if path.name == "checkpoints" else path
    if path.name == LAST and path.parent.name == "checkpoints":
        run = path.parent.parent
    folder = run / "checkpoints" / LAST if (run / "checkpoints").is_dir() else path
    if not folder.exists() and not step_folders(run):
        missing = "" if path.exists() else " (no such file or folder)"
        raise CheckpointError(
            f"{path}: no checkpoint found{missing}; give a run folder or a checkpoints/step-NNNNNNN folder"
            f"{networks_hint(path)}"
        )
    if folder == run / "checkpoints" / LAST and not (folder.is_symlink() and folder.is_dir()):
        return last_good(run)  # killed while `last` was replaced, or copied without links or with links followed
    folder = folder.resolve()
    try:
        verify(folder)
    except CheckpointError as error:
        for other in reversed(step_folders(folder.parent.parent)):
            if other.name < folder.name and _is_good(other):
                raise CheckpointError(f"{error}; an earlier one is undamaged: checkpoint={other}") from None
        raise CheckpointError(f"{error}{networks_hint(path)}") from None
    return folder


def run_folder(folder: Path) -> Path:
    """Return the folder of the run of a step folder; a step folder outside of a run is its own."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _is_good(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


class _Link(BaseModel):
    """A checkpoint in the lineage of another."""

    checkpoint: str
    step: int = Field(ge=0)
    data_fingerprint: str
    data_sets: list[str] = []


class _LossScale(BaseModel):
    """The values of `mamo.training.precision.LossScale`."""

    value: float = Field(gt=0)
    steps_since: int = Field(ge=0)
    overflows: int = Field(ge=0)
    in_a_row: int = Field(ge=0)


class _State(BaseModel):
    """Types of the values in `state.json` that are read again."""

    step: int = Field(ge=0, strict=True)
    data_fingerprint: str
    ancestry: list[_Link]
    versions: dict[str, str]
    machine: dict[str, str] = {}
    data_sets: list[str] = []
    sources: list[tuple[str, NonNegativeInt]] = []
    samples_seen: int = Field(ge=0)
    samples_skipped: int = Field(ge=0)
    loss_scale: _LossScale | None = None


def read_state(folder: Path) -> Values:
    """Read `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, lacks a value, or belongs to another step than the folder's name says.
    """
    path = folder / "state.json"
    try:
        state: Values = json.loads(path.read_text("utf-8"))
        step = _State.model_validate(state).step
    except ValidationError as error:
        names = sorted({".".join(map(str, problem["loc"])) or "all" for problem in error.errors()})
        raise CheckpointError(
            f"{path} lacks values or has some of another type ({', '.join(names)[:100]}): use another checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path} is missing or not JSON: use another checkpoint") from None
    named = re.fullmatch(r"step-(\d+)", folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{path} says step {step}, its folder is {folder.name}: use another checkpoint")
    return state


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of `NAME.safetensors` of a checkpoint."""
    try:
        return dict(load_file(folder / f"{name}.safetensors"))
    except Exception:  # SafetensorError, and others for damaged headers
        raise CheckpointError(
            f"{folder}: {name}.safetensors cannot be read: it is missing or damaged; use another checkpoint"
        ) from None


def load_module(folder: Path, name: str, module: nn.Module, resample: Mapping[str, Resample] | None = None) -> None:
    """Load `NAME.safetensors` into `module`, strictly: all names and shapes must match, after `resample`.

    Raises:
        CheckpointError: names the keys that differ.
    """
    load_transfer(folder, name, module, strict_prefix="", resample=resample or {})


def load_transfer(
    folder: Path, name: str, module: nn.Module, strict_prefix: str, resample: Mapping[str, Resample]
) -> WeightReport:
    """Load `NAME.safetensors` into a module whose heads may differ, to start another task.

    Args:
        folder: a step folder.
        name: the module's name in it.
        module: filled in place; untouched when an error is raised.
        strict_prefix: names with this prefix must exist on both sides; others may be missing on either.
        resample: by name of a tensor on the grid of patches: resamples a stored one to this module's grid, which may
            have as many patches; empty where the grid is the same.

    Raises:
        CheckpointError: names the differences outside of the heads.
    """
    tensors = read_tensors(folder, name)
    expected = _tensors_of(module)
    interpolated = [key for key in resample if key in tensors]
    tensors |= {key: resample[key](tensors[key]) for key in interpolated}
    new, unused = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    differing = {key for key in new | unused if key.startswith(strict_prefix)}
    if differing:
        raise CheckpointError(
            f"{folder}: {name} is of another architecture: {_differences(new & differing, unused & differing)}"
        )
    loaded = sorted(expected.keys() & tensors.keys())
    for key in loaded:
        if tensors[key].shape != expected[key].shape:
            raise CheckpointError(
                f"{folder}: {name} is of another architecture: `{key}` is {list(tensors[key].shape)} in the "
                f"checkpoint, {list(expected[key].shape)} in this config"
            )
    with torch.no_grad():
        for key in loaded:
            expected[key].copy_(tensors[key])
    return WeightReport(tuple(loaded), tuple(interpolated), tuple(sorted(new)), tuple(sorted(unused)))


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, each once under its first name: a tied weight is saved and loaded once."""
    names: dict[Tensor, str] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        names.setdefault(value, key)
    return {key: value for value, key in names.items()}


def _differences(wanted: set[str], found: set[str]) -> str:
    parts = []
    for label, keys in (("missing", wanted - found), ("unexpected", found - wanted)):
        if keys:
            parts.append(f"{len(keys)} {label} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})")
    return "; ".join(parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
