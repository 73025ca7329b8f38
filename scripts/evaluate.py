"""Evaluate a checkpoint: `python scripts/evaluate.py checkpoint=DIR protocol=NAME [output_dir=DIR] [key=value ...]`.

Several GPUs or processes share the work: `torchrun --nproc-per-node N scripts/evaluate.py ...`.
"""

import argparse
from pathlib import Path

from mamo.cli import run
from mamo.evaluation.protocols import PROTOCOLS


def main() -> None:
    """Parse the command line, evaluate, print."""
    protocols = "\n".join(f"  {name:24} {protocol.states}" for name, protocol in PROTOCOLS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nprotocols:\n{protocols}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+", metavar="key=value")
    parser.add_argument("--pictures", action="store_true", help="write report.html too, with pictures of what it does")
    parser.add_argument("--rows", type=int, default=8, help="pictures of each kind (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    settings = dict(text.partition("=")[::2] for text in arguments.settings)
    missing = [key for key in ("checkpoint", "protocol") if not settings.get(key)]
    if missing:
        raise ValueError(
            f"{missing[0]}=... is missing; usage: evaluate.py checkpoint=DIR protocol=NAME [key=value ...]"
        )
    path, protocol, to = Path(settings.pop("checkpoint")), settings.pop("protocol"), settings.pop("output_dir", None)
    if protocol not in PROTOCOLS:  # before the libraries are loaded, which takes seconds
        raise ValueError(f"protocol {protocol!r} is unknown; use one of: {', '.join(PROTOCOLS)}")
    from mamo.distributed import process_group, rank
    from mamo.evaluator import evaluate

    overrides = [f"{key}={value}" for key, value in settings.items()]
    output_dir, rows = Path(to) if to else None, arguments.rows if arguments.pictures else 0
    with process_group("auto"):
        entry = evaluate(path, protocol, overrides, output_dir, rows)
        if rank() > 0:
            return
    print(f"{entry['protocol']} ({entry['split']}) of {entry['checkpoint']}")
    for name, value in entry["metrics"].items():
        print(f"{name:36} {value:6.1f}")


if __name__ == "__main__":
    run(main)
