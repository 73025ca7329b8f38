"""Pre-train and fine-tune on the embedded world: `mamo pipeline --to runs/pipeline [section.key=value ...]`.

Pre-trains, fine-tunes the five tasks from that checkpoint and from random weights, and prints the table. Call it again
to continue after an interruption.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce
from mamo.config.shipped import config_folder, find_config


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, run the pipeline, print its table."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder of the run folders and the table")
    parser.add_argument("--pretraining", default="scenes_1h", metavar="FILE_OR_NAME", help="default: %(default)s")
    parser.add_argument("--finetuning", type=Path, help="folder of TASK_scenes.yaml (default: the shipped configs)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every training")
    arguments = parser.parse_intermixed_args(argv)
    pretraining = find_config(arguments.pretraining, "pretrain")
    announce("pipeline", pretraining)
    from mamo.study.pipeline import run_pipeline  # here, so that --help imports no torch

    finetuning = arguments.finetuning or config_folder("finetune")
    print(run_pipeline(arguments.to, pretraining, finetuning, arguments.overrides))
