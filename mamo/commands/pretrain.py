"""Pre-train from one YAML file: `mamo pretrain --config scenes [section.key=value ...]`.

`--config` takes a path, or the name of a shipped config of `configs/pretrain`.
"""

import argparse
from collections.abc import Sequence

from mamo.commands.shared import announce, errors_on_rank_0, resumable
from mamo.config.shipped import find_config
from mamo.imports import add_folder_of


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments and train, or print the estimate."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes", metavar="FILE_OR_NAME", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from the last good checkpoint of output_dir")
    parser.add_argument("--plan", action="store_true", help="print sizes, memory, steps and hours; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)  # overrides may follow or precede the flags
    with errors_on_rank_0():
        file = find_config(arguments.config, "pretrain")
        announce("pretrain", file)
        add_folder_of(file)
        from mamo.tasks.registry import load_config  # here, so that --help imports no torch

        config = load_config(file, arguments.overrides)
    if arguments.plan:
        from mamo.estimate import print_estimate  # here, so that a mistake in the config is reported at once

        print_estimate(config)
        return
    with resumable():
        from mamo.trainer import train

        train(config, arguments.resume)
