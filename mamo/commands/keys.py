"""Print the reference of all config keys as Markdown: `mamo keys [--write FILE]`.

`--write FILE` puts it between the markers of that file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.config.reference import config_table, with_table


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, print or write the table."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file with the markers of the table")
    file: Path | None = parser.parse_args(argv).write
    from mamo.tasks.registry import CONFIG_TYPES  # here, so that --help imports no torch

    if file is None:
        print(config_table(CONFIG_TYPES), end="")
    else:
        file.write_text(with_table(file.read_text("utf-8"), CONFIG_TYPES), "utf-8")
