"""Pre-train from one YAML file: `python scripts/pretrain.py --config configs/pretrain/scenes.yaml [key=value ...]`."""

import argparse
from pathlib import Path

from mamo.cli import run
from mamo.tasks.registry import load_config


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/scenes.yaml"))
    parser.add_argument("--resume", action="store_true", help="continue from the last good checkpoint of output_dir")
    parser.add_argument("--plan", action="store_true", help="print sizes, memory, steps and hours; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()  # overrides may follow or precede the flags
    config = load_config(arguments.config, arguments.overrides)
    if arguments.plan:
        from mamo.estimate import print_estimate  # here, so that a mistake in the config is answered at once

        print_estimate(config)
    else:
        from mamo.trainer import train

        train(config, arguments.resume)


if __name__ == "__main__":
    run(main)
