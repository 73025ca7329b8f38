"""Read weight files without unpickling code, and report which of their tensors were used."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

NAMES_SHOWN = 6
"""Names of each kind in the text of a report."""
PROBLEMS_SHOWN = 24
"""Problems in the message of an error."""


@dataclass(frozen=True)
class WeightReport:
    """Names of the parameters that a weight file filled, and (``unused``) names in the file."""

    loaded: tuple[str, ...]
    interpolated: tuple[str, ...] = ()  # loaded after resampling to another grid
    new: tuple[str, ...] = ()  # not in the file, left at their initial values
    unused: tuple[str, ...] = ()  # in the file, of heads that the network does not have

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        for label, names in (("interpolated", self.interpolated), ("new", self.new), ("unused", self.unused)):
            shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            text += f", {len(names)} {label}" + (f" ({shown})" if names else "")
        return text


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors, .pt, .pth or .bin file, or a folder of them, without unpickling code.

    In a folder, .safetensors files take precedence over ``pytorch_model.bin``. A dict under ``model`` or ``state_dict``
    is unwrapped.

    Raises:
        ValueError: there is no such file or folder, or the file holds anything but tensors.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{path} holds neither .safetensors files nor pytorch_model.bin")
        return {key: value for file in files for key, value in read_weights(file).items()}
    if not path.is_file():
        raise ValueError(f"{path} is neither a weight file nor a folder of weights")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    except Exception as error:  # each format has its own errors for damaged files
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds values that are not tensors; save a plain state dict")
    return state


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state)
    return dict(state)


def check_keys(found: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    """Raise ValueError, naming the keys, unless ``found`` has the names and shapes of ``wanted``."""
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unused {key}" for key in found if key not in wanted]
    problems += [
        f"{key} is {list(found[key].shape)}, must be {list(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:PROBLEMS_SHOWN])
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise ValueError(f"weights of {source} do not fit: {shown}{more}")
