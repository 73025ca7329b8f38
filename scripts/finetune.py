"""Fine-tune a checkpoint: `python scripts/finetune.py --config configs/finetune/TASK.yaml checkpoint=DIR`.

Model, tokenizer, picture size and text length are the checkpoint's, unless the file or an override gives the size.
"""

import argparse
from pathlib import Path

from mamo.cli import run
from mamo.tasks.registry import finetune_config


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from the last good checkpoint of output_dir")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()  # overrides may follow or precede the flags
    config = finetune_config(arguments.config, arguments.overrides, arguments.resume)
    from mamo.trainer import train  # here, so that a mistake in the config is answered at once

    train(config, arguments.resume)


if __name__ == "__main__":
    run(main)
