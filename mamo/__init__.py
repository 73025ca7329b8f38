"""Masked multimodal pre-training of vision-language models (MAMO, SIGIR 2023).

`mamo.load("runs/scenes")` gives a trained model to use; the parts (`mamo.masking`, `mamo.losses`, `mamo.teacher`,
`mamo.queue`, `mamo.models`, `mamo.explain`) are imported by themselves.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamo.api import (
        BadSample,
        CheckpointError,
        DeviceError,
        EmptyGalleryError,
        Gallery,
        Grounding,
        MissingHeadError,
        Model,
        Processor,
        TokenizerMismatchError,
        load,
    )

__all__ = [
    "BadSample", "CheckpointError", "DeviceError", "EmptyGalleryError", "Gallery", "Grounding", "MissingHeadError",
    "Model", "Processor", "TokenizerMismatchError", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import mamo.masking` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'mamo' has no attribute {name!r}")
    from mamo import api

    return getattr(api, name)
