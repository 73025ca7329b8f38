"""Prepare data: validate and check pairs files, index shards, train a tokenizer, export scenes, build data sets."""

import argparse
import functools
import sys
from pathlib import Path

from mamo.data.audit import audit
from mamo.data.builders.captions import build_karpathy, build_vg
from mamo.data.builders.nlvr import build_nlvr
from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.questions import build_vgqa, build_vqa2
from mamo.data.builders.refcoco import build_refcoco
from mamo.data.builders.web import build_cc3m, build_sbu
from mamo.data.shards import index_folder
from mamo.data.tokenizer import train_tokenizer
from mamo.data.validate import TASK_RECORDS, check_pairs, check_records, validate_pairs, validate_records
from mamo.world.export import LAYOUTS, export_scenes
from mamo.world.scene import DIFFICULTIES, SPLITS, SceneWorld

BUILDERS = {
    "coco": functools.partial(build_karpathy, "coco"),
    "flickr30k": functools.partial(build_karpathy, "flickr30k"),
    "vg": build_vg,
    "cc3m": build_cc3m,
    "sbu": build_sbu,
    "vqa2": build_vqa2,
    "vgqa": build_vgqa,
    "nlvr": build_nlvr,
    "nlvr2": build_nlvr2,
    "refcoco": build_refcoco,
}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    validate = commands.add_parser("validate", help="check every row of a pairs file, or of (a glob of) tar shards")
    check = commands.add_parser("check", help="decode every image; exit code 1 on a gap")
    tokenizer = commands.add_parser("tokenizer", help="train WordPiece on pairs files or text, one caption a line")
    tokenizer.add_argument("files", type=Path, nargs="+")
    tokenizer.add_argument("--size", type=int, required=True, help="largest number of tokens")
    index = commands.add_parser("index", help="write down once where each pair lies in a folder of tar shards")
    index.add_argument("folder", type=Path)
    index.add_argument("--workers", type=int, default=1, help="processes that read shards")
    overlap = commands.add_parser("audit", help="images that pre-training and evaluation share; exit code 1 if any")
    overlap.add_argument("train", type=Path, help="pairs file of the pre-training data")
    overlap.add_argument("eval", type=Path, help="pairs file of the evaluation set")
    overlap.add_argument("--train-split", help="of a Karpathy file")
    overlap.add_argument("--eval-split", help="of a Karpathy file")
    export = commands.add_parser("export", help="write the embedded data set as files")
    export.add_argument("source", choices=["scenes"])
    export.add_argument("--difficulty", choices=DIFFICULTIES, default="easy")
    export.add_argument("--split", choices=SPLITS, default="train")
    export.add_argument("--layout", choices=LAYOUTS, default="pairs", help="JSON Lines, or a data set's official files")
    for name, default in (("--seed", 0), ("--count", 1000), ("--image-size-px", 96)):
        export.add_argument(name, type=int, default=default)
    build = commands.add_parser("build", help="turn a public release into our records; exit code 1 on a gap")
    build.add_argument("source", choices=list(BUILDERS))
    build.add_argument("--from", type=Path, required=True, dest="release")
    for reader in (validate, check):
        reader.add_argument("file", type=Path)
        reader.add_argument("--task", choices=["pairs", *TASK_RECORDS], default="pairs", help="what its rows are")
    for reader in (validate, check, tokenizer):
        reader.add_argument("--split", help="needed for Karpathy files: train, val or test")
    for writer in (tokenizer, export, build):
        writer.add_argument("--to", type=Path, required=True, help="folder to write")
    return main


def run(args: argparse.Namespace) -> tuple[list[str], bool]:
    """The lines to print, and whether everything that was expected is there."""
    if args.command == "validate" and args.task != "pairs":
        return validate_records(args.file, args.task), True
    if args.command == "validate":
        return validate_pairs(args.file, args.split), True
    if args.command == "index":
        pairs = index_folder(args.folder, args.workers)
        return [f"{args.folder}: {len(pairs)} pairs in {len(pairs.shards)} shards"], True
    if args.command == "tokenizer":
        return [f"{args.to}: {train_tokenizer(args.files, args.size, args.to, args.split)} tokens"], True
    if args.command == "export":
        size = (args.image_size_px, args.image_size_px)
        world = SceneWorld(args.difficulty, args.seed)
        return [str(export_scenes(world, args.split, args.count, size, args.to, args.layout))], True
    if args.command == "check":
        is_pairs = args.task == "pairs"
        report = check_pairs(args.file, args.split) if is_pairs else check_records(args.file, args.task)
        return report.lines(), report.is_complete
    if args.command == "audit":
        found = audit(args.train, args.eval, args.train_split, args.eval_split)
        return found.lines(), found.is_complete
    built = BUILDERS[args.source](args.release, args.to)
    return built.lines(), built.is_complete


if __name__ == "__main__":
    try:
        lines, is_complete = run(parser().parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))
    sys.exit(0 if is_complete else 1)
