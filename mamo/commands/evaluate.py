"""Evaluate a checkpoint: `mamo evaluate checkpoint=DIR protocol=NAME [output_dir=DIR] [section.key=value ...]`.

`protocol=fine-grained data.root=FOLDER` scores every published set that lies in a folder, and lists the others.

Several GPUs or processes share the work: `torchrun --nproc-per-node N -m mamo evaluate ...`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.commands.shared import announce, errors_on_rank_0, positive
from mamo.config.values import expand_path
from mamo.evaluation.fine_grained import SETS, absent_lines, find_set, table_lines
from mamo.evaluation.protocols import FINE_GRAINED, PROTOCOLS, ROOT


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
        settings: `checkpoint`, `protocol`, optionally `output_dir`, and `data.root` of the published sets; the rest are
            overrides by dotted key.
        pictures: pictures of each kind in `report.html`; 0 writes none.
    """
    missing = [key for key in ("checkpoint", "protocol") if not settings.get(key)]
    if missing:
        raise ValueError(f"{missing[0]}=... is missing; usage: evaluate checkpoint=DIR protocol=NAME [key=value ...]")
    path, to = (_path(key, settings.pop(key, None)) for key in ("checkpoint", "output_dir"))
    protocol = settings.pop("protocol")
    assert path is not None
    if protocol not in (*PROTOCOLS, FINE_GRAINED):  # before torch is imported, which takes seconds
        raise ValueError(f"protocol {protocol!r} is unknown; use one of: {', '.join((*PROTOCOLS, FINE_GRAINED))}")
    root = _path("data.root", settings.pop("data.root", None))
    use_root(settings, protocol, root)
    announce(protocol, path)
    from mamo.distributed import process_group, rank
    from mamo.evaluation.results import facts_line, remarks
    from mamo.evaluator import evaluate, evaluate_fine_grained

    overrides = [f"{key}={value}" for key, value in settings.items()]
    with process_group("auto"):
        if protocol == FINE_GRAINED:
            folder = root or Path(ROOT)
            entries = evaluate_fine_grained(path, folder, overrides, to, pictures)
            if rank() == 0:
                print_table(entries, folder)
            return
        entry = evaluate(path, protocol, overrides, to, pictures)
        if rank() > 0:
            return
    print(f"{entry['protocol']} ({entry['split']}) of {entry['checkpoint']}")
    for name, value in entry["metrics"].items():
        print(f"{name:36} {value:6.1f}")
    for line in [facts_line(entry["facts"]), *remarks(entry["metrics"])]:
        if line:
            print(line)


def use_root(settings: dict[str, str], protocol: str, root: Path | None) -> None:
    """Set `evaluation.items_files` of one published set to its file below `data.root`.

    Raises ValueError where the protocol is not of such a set.
    """
    if root is None or protocol == FINE_GRAINED:
        return
    name = next((name for name in SETS if protocol in {f"{name}-{score}" for score in SETS[name].scores}), None)
    if name is None:
        raise ValueError(f"data.root: not read under {protocol}; it is the folder of the published fine-grained sets")
    file = find_set(root, name)
    settings.setdefault("evaluation.items_files", json.dumps([str(file or root / name / f"{name}.jsonl")]))


def print_table(entries: Sequence[Mapping[str, Any]], root: Path) -> None:
    """Print the table of all sets, the lineage of the checkpoint, and how to get the other sets."""
    print("\n".join(table_lines(entries)))
    print(f"{entries[0]['checkpoint']} was trained on: {' -> '.join(entries[0]['trained_on'])}")
    print("published numbers are of the score in whose row they are; -: none; a network may have seen images of COCO")
    absent = absent_lines(root)
    if absent:
        print("not scored:")
    for line in absent:
        print(f"  {line}")


def _path(key: str, text: str | None) -> Path | None:
    """Expand the path of a setting. Raises ValueError naming the key."""
    if text is None:
        return None
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
