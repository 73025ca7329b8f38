"""Find shipped configs and networks by name: in the checkout, or in the copy that the wheel holds."""

import difflib
from pathlib import Path
from typing import Literal, get_args

Folder = Literal["pretrain", "finetune", "studies"]
COMMANDS: dict[Folder, str] = {"pretrain": "pretrain", "finetune": "finetune", "studies": "study"}
_PACKAGED = Path(__file__).parents[1] / "configs"  # exists in a wheel only
_CHECKOUT = Path(__file__).parents[2] / "configs"
_NOT_STUDIES = ("base_", "published")
NETWORKS = Path(__file__).parents[1] / "networks"
"""Step folders of trained networks (`mamo export`), each under its name."""


def config_folder(folder: Folder) -> Path:
    """Return the folder of shipped configs of one command."""
    return (_PACKAGED if _PACKAGED.is_dir() else _CHECKOUT) / folder


def is_packaged(file: Path) -> bool:
    """Return whether a config is the copy in an installed wheel."""
    return file.is_relative_to(_PACKAGED)


def config_names(folder: Folder) -> list[str]:
    """Return the names of the shipped configs of one command, sorted."""
    names = sorted(file.stem for file in config_folder(folder).glob("*.yaml"))
    return [name for name in names if not name.startswith(_NOT_STUDIES)] if folder == "studies" else names


def find_config(text: str, folder: Folder) -> Path:
    """Return the config file at the path `text`, or else the shipped config of that name.

    Raises:
        ValueError: neither exists; the message lists the nearest names.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        return path
    names = config_names(folder)
    if text in names:
        return config_folder(folder) / f"{text}.yaml"
    for other in get_args(Folder):
        if other != folder and text in config_names(other):
            raise ValueError(f"{text} is a config of another command: `mamo {COMMANDS[other]} --config {text}`")
    containing = [name for name in names if path.stem in name]
    near = dict.fromkeys([*containing, *difflib.get_close_matches(path.stem, names, cutoff=0.5)])
    raise ValueError(f"config file not found: {text}; shipped configs: {', '.join(near or names)}")


def network_names() -> list[str]:
    """Return the names of the shipped networks, sorted."""
    return sorted(folder.name for folder in NETWORKS.glob("*") if folder.is_dir() and folder.name.isidentifier())


def find_network(path: Path) -> Path:
    """Return the folder of the shipped network of that name; `path` itself where it exists, or is no such name."""
    return path if path.exists() or str(path) not in network_names() else NETWORKS / path


def networks_hint(path: Path) -> str:
    """Return the end of a message that `path` is not a checkpoint: the names of the shipped networks, if any."""
    names = network_names()
    if path.exists():
        return f"; {path} is also a shipped network, rename this folder to use it" if str(path) in names else ""
    return f", or a shipped network ({', '.join(names)})" if names else ""


def is_shipped_network(folder: Path) -> bool:
    """Return whether a step folder is that of a shipped network, which is not written into."""
    return folder.resolve().parent == NETWORKS.resolve()
