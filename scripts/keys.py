"""Print the reference of all config keys; `--write README.md` puts it between that file's markers instead."""

import argparse
from pathlib import Path

from mamo.cli import run
from mamo.config.reference import config_table, with_table
from mamo.tasks.registry import CONFIG_TYPES


def main() -> None:
    """Parse the command line, print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file with the markers of the table")
    file = parser.parse_args().write
    if file is None:
        print(config_table(CONFIG_TYPES), end="")
    else:
        file.write_text(with_table(file.read_text("utf-8"), CONFIG_TYPES), "utf-8")


if __name__ == "__main__":
    run(main)
