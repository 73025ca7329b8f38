"""Write a page of what a network does with pictures drawn on the spot: `mamo demo [checkpoint=RUN] --to demo.html`.

The page has retrieval, heat maps, masked words and true and false sentences, on held-out pictures of the embedded
world. Without `checkpoint=` the network is `scenes_1h`, which comes with the package.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce
from mamo.config.values import expand_path


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, write the page, print its path."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_text = (
        "checkpoint=RUN: a run (its last checkpoint), a step, an export or a shipped network (default: %(default)s)"
    )
    parser.add_argument("checkpoint", nargs="?", default="checkpoint=scenes_1h", help=help_text)
    parser.add_argument("--to", type=Path, default=Path("demo.html"), help="file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    name = expand_path(arguments.checkpoint.removeprefix("checkpoint="))
    to: Path = arguments.to
    if to.is_dir() or to.suffix not in (".html", ".htm"):
        raise ValueError(f"--to: {to} is the page to write; name a file that ends in .html")
    announce("demo", name)
    from mamo.inference.demo import write_demo  # here, so that --help imports no torch
    from mamo.inference.loading import load

    write_demo(load(name), name, to)
    print(to)
