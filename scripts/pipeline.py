"""Everything on the embedded world with one command: `python scripts/chain.py --to runs/chain [section.key=value ...]`.

Pre-trains, fine-tunes the four tasks from that checkpoint and from random weights, and prints the table. A killed chain
goes on where it was when it is called again.
"""

import argparse
from pathlib import Path

from mamo.cli import run


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder of the run folders and the table")
    parser.add_argument("--pretraining", type=Path, default=Path("configs/pretrain/scenes_1h.yaml"))
    parser.add_argument("--finetuning", type=Path, default=Path("configs/finetune"), help="folder of TASK_scenes.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every training")
    arguments = parser.parse_intermixed_args()
    from mamo.study.pipeline import run_pipeline  # here, so that --help is quick

    print(run_pipeline(arguments.to, arguments.pretraining, arguments.finetuning, arguments.overrides))


if __name__ == "__main__":
    run(main)
