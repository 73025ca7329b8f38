"""Evaluate a checkpoint: `mamo evaluate checkpoint=DIR protocol=NAME [output_dir=DIR] [section.key=value ...]`.

Several GPUs or processes share the work: `torchrun --nproc-per-node N -m mamo evaluate ...`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce, errors_on_rank_0, positive
from mamo.config.values import expand_path
from mamo.evaluation.protocols import PROTOCOLS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, evaluate, print the metrics on rank 0."""
    protocols = "\n".join(f"  {name:24} {protocol.states}" for name, protocol in PROTOCOLS.items())
    parser = argparse.ArgumentParser(
        prog,
        description=f"{__doc__}\nprotocols:\n{protocols}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="+", metavar="key=value")
    parser.add_argument("--pictures", action="store_true", help="also write report.html, with pictures of the outputs")
    parser.add_argument("--rows", type=positive, default=8, help="pictures of each kind (default: %(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    settings = dict(text.partition("=")[::2] for text in arguments.settings)
    with errors_on_rank_0():  # every rank reads the same files
        evaluate_and_print(settings, arguments.rows if arguments.pictures else 0)


def evaluate_and_print(settings: dict[str, str], pictures: int) -> None:
    """Evaluate the checkpoint that `settings` name, and print the metrics on rank 0.

    Args:
        settings: `checkpoint`, `protocol`, optionally `output_dir`; the rest are overrides by dotted key.
        pictures: pictures of each kind in `report.html`; 0 writes none.
    """
    missing = [key for key in ("checkpoint", "protocol") if not settings.get(key)]
    if missing:
        raise ValueError(f"{missing[0]}=... is missing; usage: evaluate checkpoint=DIR protocol=NAME [key=value ...]")
    path, to = (_path(key, settings.pop(key, None)) for key in ("checkpoint", "output_dir"))
    protocol = settings.pop("protocol")
    assert path is not None
    if protocol not in PROTOCOLS:  # before torch is imported, which takes seconds
        raise ValueError(f"protocol {protocol!r} is unknown; use one of: {', '.join(PROTOCOLS)}")
    announce(protocol, path)
    from mamo.distributed import process_group, rank
    from mamo.evaluation.results import facts_line, remarks
    from mamo.evaluator import evaluate

    overrides = [f"{key}={value}" for key, value in settings.items()]
    with process_group("auto"):
        entry = evaluate(path, protocol, overrides, to, pictures)
        if rank() > 0:
            return
    print(f"{entry['protocol']} ({entry['split']}) of {entry['checkpoint']}")
    for name, value in entry["metrics"].items():
        print(f"{name:36} {value:6.1f}")
    for line in [facts_line(entry["facts"]), *remarks(entry["metrics"])]:
        if line:
            print(line)


def _path(key: str, text: str | None) -> Path | None:
    """Expand the path of a setting. Raises ValueError naming the key."""
    if text is None:
        return None
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
