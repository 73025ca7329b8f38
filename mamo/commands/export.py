"""Export a checkpoint as a small folder, without optimizer and teacher: `mamo export RUN --to FOLDER [--bf16]`.

The folder holds weights, config, tokenizer, lineage, evaluations and card. Every command reads it as it reads a run.
The networks that `mamo` ships are such folders.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, write the folder, print its size."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run (its last checkpoint), a step, or a shipped network")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--bf16", action="store_true", help="round the weights to bf16: half the size, no evaluations")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    arguments = parser.parse_args(argv)
    announce("export", arguments.to)
    import torch  # here, so that --help imports no torch

    from mamo.inference.step_export import export_checkpoint

    to: Path = arguments.to
    dtype = torch.bfloat16 if arguments.bf16 else None
    folder = Path(arguments.checkpoint.removeprefix("checkpoint="))  # as other commands spell it
    entries = export_checkpoint(folder, to, dtype, arguments.overwrite)
    n_bytes = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"{to}: {n_bytes / 1e6:.1f} MB, {len(entries)} evaluations")
