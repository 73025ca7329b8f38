"""Save the batch and weights that reproduce a non-finite loss."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from mamo.data.collate import Batch
from mamo.distributed import all_gather_object, rank
from mamo.training.checkpoint import snapshot, write_folder


class NonFiniteLoss(ValueError):
    """A loss or the gradient norm is NaN or infinite; raised before the optimizer step."""

    def __init__(self, names: list[str], step: int, sample_ids: list[int], folder: Path | None) -> None:
        shown = ", ".join(str(i) for i in sample_ids[:64]) + (", ..." if len(sample_ids) > 64 else "")
        kept = f"are in {folder}" if folder else "could not be written"
        super().__init__(
            f"not finite at step {step}: {', '.join(names)}. The optimizer step was not taken. Samples: {shown}. "
            f"The batch and all weights {kept}. `--resume` would fail here again: start a new run from this "
            "run's last checkpoint (checkpoint=RUN output_dir=NEW), for example with a lower training.learning_rate"
        )


def dump_failing_batch(
    output_dir: Path, step: int, modules: Mapping[str, nn.Module], batch: Batch, files: Mapping[str, Path]
) -> Path:
    """Save the batch (as `batch.safetensors`) and all weights, in the layout of a checkpoint.

    After loading these weights, `Loop.backward` on this batch at the `step` of `state.json` reproduces the losses. With
    several ranks each contributes its batch (`batch-1.safetensors` is that of rank 1), and rank 0 writes.

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
