"""Print the card of a checkpoint as Markdown: `mamo card RUN_OR_STEP_FOLDER [--to FILE]`.

The card holds the method, the training data, the lineage and every evaluation in the folder of the run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, print or write the card."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its last checkpoint) or a step folder")
    parser.add_argument("--to", type=Path, help="file to write; without it the card is printed")
    arguments = parser.parse_args(argv)
    announce("card", arguments.checkpoint)
    from mamo.reports.card import model_card  # here, so that --help imports no torch
    from mamo.tasks.registry import load_stored_config
    from mamo.training import checkpoint

    folder = checkpoint.resolve(arguments.checkpoint)
    text = model_card(folder, load_stored_config(folder))
    if arguments.to is None:
        print(text, end="")
    else:
        arguments.to.write_text(text, "utf-8")
