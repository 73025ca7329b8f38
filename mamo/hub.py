"""Find the files of a Hugging Face repository by name, first in the cache, then on the hub.

The hub is probed once before a download: without that, a mistyped name on a machine without network costs the client's
retries, most of a minute.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

ANSWER_WITHIN_S = 5.0


def hub_folder(name: str, wanted: Sequence[str], optional: Sequence[str] = ()) -> Path:
    """Return a folder with the files of repository `name` that match `wanted` and `optional`.

    Args:
        name: `user/name`.
        wanted: patterns, of which at least one must match a file.
        optional: patterns of further files, fetched where they exist.

    Raises:
        ValueError: not cached, and no such repository, no such file in it, or no network.
    """

    def is_complete(folder: Path) -> bool:
        return any(path for pattern in wanted for path in folder.glob(pattern))

    def fetch(is_cached: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=[*wanted, *optional], local_files_only=is_cached))

    try:
        folder = fetch(is_cached=True)
        if is_complete(folder):
            return folder
    except (OSError, ValueError):  # the client's errors derive from these: not cached, or an invalid name
        pass
    try:
        HfApi().model_info(name, timeout=ANSWER_WITHIN_S)  # neither retried nor answered from the cache
        folder = fetch(is_cached=False)
    except Exception as error:  # the types depend on the client's version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name!r} is not a local folder, not in the cache, and cannot be fetched from the hub: {reason}"
        ) from None
    if not is_complete(folder):
        raise ValueError(f"hub repository {name!r} has no {' or '.join(wanted)}")
    return folder
