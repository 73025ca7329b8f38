"""Files of a Hugging Face repository by name: from the cache, else from the hub, which is asked once.

Without that question a mistyped name on a machine without a network costs the hub client's retries, most of a minute.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

ANSWER_WITHIN_S = 5.0


def hub_folder(name: str, wanted: Sequence[str], beside: Sequence[str] = ()) -> Path:
    """A folder with the files of repository `name` that match `wanted` (one pattern at least) and `beside` (if there).

    Raises:
        ValueError: not cached, and no such repository, no such file in it or no network; the caller says what is asked
            for.
    """

    def is_complete(folder: Path) -> bool:
        return any(path for pattern in wanted for path in folder.glob(pattern))

    def fetch(is_cached: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=[*wanted, *beside], local_files_only=is_cached))

    try:
        folder = fetch(is_cached=True)
        if is_complete(folder):
            return folder
    except (OSError, ValueError):  # the client's own errors derive from these: not cached, or no possible name
        pass
    try:
        HfApi().model_info(name, timeout=ANSWER_WITHIN_S)  # neither retried nor answered from the cache
        folder = fetch(is_cached=False)
    except Exception as error:  # which ones, depends on the client's version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name!r} is no folder here, not cached, and not on the hub or out of reach: {reason}"
        ) from None
    if not is_complete(folder):
        raise ValueError(f"hub repository {name!r} holds no {' or '.join(wanted)}")
    return folder
