"""Masked multimodal pre-training of vision-language models (MAMO, SIGIR 2023).

`mamo.load("runs/scenes")` gives a trained model to use; the parts (`mamo.masking`, `mamo.losses`, `mamo.teacher`,
`mamo.queue`, `mamo.models`, `mamo.explain`) are imported by themselves.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamo.entry import build, train
    from mamo.inference.loading import load
    from mamo.inference.model import (
        BadSampleError,
        Candidate,
        CheckpointError,
        DeviceError,
        EmptyGalleryError,
        Gallery,
        Grounding,
        Hit,
        MissingHeadError,
        Model,
        Processor,
        TokenizerMismatchError,
    )

__all__ = [
    "BadSampleError", "Candidate", "CheckpointError", "DeviceError", "EmptyGalleryError", "Gallery", "Grounding", "Hit",
    "MissingHeadError", "Model", "Processor", "TokenizerMismatchError", "build", "load", "train",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import mamo.masking` stays light."""
    if name == "__version__":
        return version("mamo")
    if name not in __all__:
        raise AttributeError(f"module 'mamo' has no attribute {name!r}")
    if name in ("build", "train"):
        from mamo import entry

        return getattr(entry, name)
    from mamo.inference import loading, model

    return loading.load if name == "load" else getattr(model, name)
