"""Fine-tune a checkpoint: `mamo finetune --config vqa_scenes checkpoint=DIR [section.key=value ...]`.

`--config` takes a path, or the name of a shipped config of `configs/finetune`. Model, tokenizer, image size and text
length are the checkpoint's, unless the file or an override sets the size.
"""

import argparse
from collections.abc import Sequence

from mamo.commands.shared import announce, errors_on_rank_0, resumable
from mamo.config.shipped import find_config
from mamo.imports import add_folder_of


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE_OR_NAME")
    parser.add_argument("--resume", action="store_true", help="continue from the last good checkpoint of output_dir")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)  # overrides may follow or precede the flags
    with errors_on_rank_0():
        file = find_config(arguments.config, "finetune")
        announce("finetune", file)
        add_folder_of(file)
        from mamo.tasks.registry import finetune_config  # here, so that --help imports no torch

        config = finetune_config(file, arguments.overrides, arguments.resume)
    with resumable():
        from mamo.trainer import train

        train(config, arguments.resume)
