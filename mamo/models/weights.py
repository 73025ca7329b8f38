"""Read and write weight files without unpickling code, and report which of their tensors were used."""

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

NAMES_SHOWN = 6
"""Names of each kind in the text of a report."""
PROBLEMS_SHOWN = 24
"""Problems in the message of an error."""
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BUFFERS = ("_ids", "_index", "_idx", "idx_queue", "ptr", "num_batches_tracked", "mask")
"""Ends of the names of tensors that are no weights: whole numbers, and masks of minus infinity."""
_OTHER_FILES = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`",
    b"<": "is a web page, not weights: download the file itself",
}
"""First bytes -> rest of the message."""


@dataclass(frozen=True)
class WeightReport:
    """Names of the parameters that a weight file filled, and (``unused``) names in the file."""

    loaded: tuple[str, ...]
    interpolated: tuple[str, ...] = ()  # loaded after resampling to another grid
    new: tuple[str, ...] = ()  # not in the file, left at their initial values
    unused: tuple[str, ...] = ()  # in the file, of heads that the network does not have

    def __str__(self) -> str:
        named = {"interpolated": self.interpolated, "new": self.new, "unused": self.unused}
        counts = [f"{len(self.loaded)} tensors loaded", *(f"{len(names)} {label}" for label, names in named.items())]
        lists = [
            f"{label}: {', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''}"
            for label, names in named.items()
            if names
        ]
        return "; ".join([", ".join(counts), *lists])


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file: the library writes it for its owner only."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode  # follows the umask, which cannot be read without setting it for all threads
    safetensors.torch.save_file(tensors, path, metadata)
    os.chmod(path, mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors, .pt, .pth or .bin file, or a folder of them, without unpickling code.

    In a folder, .safetensors files take precedence over ``pytorch_model.bin``. A dict under ``model`` or ``state_dict``
    is unwrapped. Prefixes that wrappers put before all names (``module.``, ``_orig_mod.``, ``model.``, ``backbone.``)
    are removed, in any order.

    Raises:
        ValueError: there is no such file or folder, or the file holds anything but tensors; or a tensor that is not
            dense, of floating-point numbers of at least 16 bits, and finite. Buffers such as ``position_ids`` may hold
            whole numbers.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{path} holds neither .safetensors files nor pytorch_model.bin")
        return _without_wrappers({key: value for file in files for key, value in _read_file(file).items()})
    if not path.is_file():
        raise ValueError(f"{path} is neither a weight file nor a folder of weights")
    return _without_wrappers(_read_file(path))


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove each prefix of `_WRAPPERS` that all names share, until none is left."""
    while state and (prefix := next((p for p in _WRAPPERS if all(_has_prefix(key, p) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _has_prefix(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and key != prefix


def _read_file(path: Path) -> dict[str, Tensor]:
    """Read one file of tensors. Raises ValueError saying what else it is."""
    with path.open("rb") as file:
        head = file.read(64)
    kind = next((text for start, text in _OTHER_FILES.items() if head.lstrip().lower().startswith(start)), None)
    if kind is None and not head:
        kind = "is empty"
    if kind is not None:
        raise ValueError(f"{path} {kind}")
    state = _read_safetensors(path) if head[8:9] == b"{" else _read_torch_file(path)
    for name, value in state.items():
        problem = _problem_of(name, value)
        if problem:
            raise ValueError(f"{path}: {name:.100} {problem}")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception:  # SafetensorError, and others for damaged headers
        raise ValueError(f"{path} is a damaged safetensors file: get it again") from None


def _problem_of(name: str, value: Tensor) -> str:
    """Return what makes a tensor unusable as weights, with what to do; empty if nothing."""
    if value.device.type == "meta":
        return "has no values (device meta): save the state dict after loading the weights"
    if value.layout != torch.strided or value.is_nested:
        return "is sparse or nested: save it as a dense tensor"
    if name.endswith(_BUFFERS) and not value.is_quantized and not value.is_complex():
        return ""
    if value.dtype not in _DTYPES:
        kind = str(value.dtype).removeprefix("torch.")
        return f"has numbers of type {kind}: save the weights as float32, float16 or bfloat16, not quantised"
    if not bool(torch.isfinite(value).all()):
        return "has values that are NaN or infinite: get or train the weights again"
    return ""


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which contains code: save its state_dict() as a .safetensors file"
        )
    try:
        with path.open("rb") as file:  # by its content: torch takes the suffix for the format
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the types differ between formats and versions
        raise ValueError(f"{path} {_refusal(str(error))}") from None
    for wrapper in ("model", "state_dict"):
        inner = state.get(wrapper) if isinstance(state, Mapping) else None
        state = inner if isinstance(inner, Mapping) else state
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name: save a plain state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(
                f"{path}: {key!r:.60} is a {kind}; values that are not tensors by name are not read: save a plain "
                "state dict"
            )
    return dict(state)


def _refusal(error: str) -> str:
    """Return the rest of a message for an error of `torch.load`, which advises to switch its safety off."""
    found = re.search(r"GLOBAL ([\w.]{1,80})", error)
    if found:
        return (
            f"contains a pickled object other than tensors ({found[1]}), which is not loaded, as unpickling it can run "
            "code: save only its state dict, best as .safetensors"
        )
    return "cannot be read as weights: it is damaged or of another format than .safetensors and PyTorch's"


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def check_keys(found: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    """Raise ValueError, naming the keys, unless ``found`` has the names and shapes of ``wanted``."""
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unused {key:.100}" for key in found if key not in wanted]
    problems += [
        f"{key} is {list(found[key].shape)}, must be {list(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:PROBLEMS_SHOWN])
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise ValueError(f"weights of {source} do not fit: {shown}{more}")
