"""Write the generated tables of all READMEs: `python scripts/tables.py [--check]`.

Exit code 1 with `--check` where a table is older than the results, configs or code it comes from.
"""

import argparse
from pathlib import Path

from mamo.cli import run

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Read the arguments, write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; name the files that are stale")
    is_checking = parser.parse_args().check
    from mamo.study.tables import fill, readmes  # imports matplotlib and scipy

    stale = []
    for file in readmes(ROOT):
        text = file.read_text("utf-8")
        filled = fill(text, ROOT)
        if filled != text:
            stale.append(file)
            if not is_checking:
                file.write_text(filled, "utf-8")
    for file in stale:
        print(file.relative_to(ROOT))
    return int(is_checking and bool(stale))


if __name__ == "__main__":
    run(main)
