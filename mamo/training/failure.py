"""What a non-finite loss leaves behind: a folder that reproduces it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mamo.distributed import all_gather_object, rank
from mamo.training.checkpoint import snapshot, write_folder


class NonFiniteLoss(ValueError):
    """A loss or the gradient norm is NaN or infinite; raised before the optimizer moves."""

    def __init__(self, names: list[str], step: int, sample_ids: list[int], folder: Path | None) -> None:
        shown = ", ".join(str(i) for i in sample_ids[:64]) + (", ..." if len(sample_ids) > 64 else "")
        kept = f"are in {folder}" if folder else "could not be written"
        super().__init__(
            f"not finite at step {step}: {', '.join(names)}. The optimizer has not moved. Samples: {shown}. "
            f"The batch and all weights {kept}. `--resume` would come here again: start a new run from this "
            "one's last checkpoint (checkpoint=RUN output_dir=NEW), for example with a lower training.learning_rate"
        )


def dump_failing_batch(
    output_dir: Path, step: int, modules: Mapping[str, nn.Module], batch: Any, files: Mapping[str, Path]
) -> Path:
    """Save the batch (as `batch.safetensors`) beside all weights, in the layout of a checkpoint.

    With these weights loaded, `Loop.backward` of this batch at the `step` of `state.json` gives the same losses again.
    Of several processes each gives its batch, `batch-1.safetensors` for the second, and the first writes.

    Returns:
        `non-finite/step-NNNNNNN`, numbered by the step that failed.
    """
    folder = output_dir / "non-finite" / f"step-{step + 1:07d}"
    tensors = snapshot(modules)
    for number, part in enumerate(all_gather_object({name: value.cpu() for name, value in batch.tensors().items()})):
        tensors[f"batch-{number}" if number else "batch"] = part
    if rank() == 0:
        write_folder(folder, tensors, {"step": step}, files)
    return folder
