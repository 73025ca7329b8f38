"""The card of a checkpoint, as Markdown: `python scripts/card.py RUN_OR_STEP_FOLDER [--to FILE]`.

What it is, what it was trained on and descends from, and every evaluation that its run's folder holds.
"""

import argparse
from pathlib import Path

from mamo.cli import run
from mamo.reports.card import model_card
from mamo.tasks.registry import load_config
from mamo.training import checkpoint
from mamo.training.run_dir import CONFIG


def main() -> None:
    """Parse the command line, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its last checkpoint) or a step folder")
    parser.add_argument("--to", type=Path, help="file to write; without it the card is printed")
    arguments = parser.parse_args()
    folder = checkpoint.resolve(arguments.checkpoint)
    text = model_card(folder, load_config(folder / CONFIG))
    if arguments.to is None:
        print(text, end="")
    else:
        arguments.to.write_text(text, "utf-8")


if __name__ == "__main__":
    run(main)
