"""Prepare data: validate and check pairs files, train a tokenizer, export scenes, build public data sets."""

import argparse
import sys
from pathlib import Path

from mamo.data.builders.nlvr import build_nlvr
from mamo.data.export import export_scenes
from mamo.data.scenes import DIFFICULTIES, SPLITS
from mamo.data.tokenizer import train_tokenizer
from mamo.data.validate import check_pairs, validate_pairs


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    for name, purpose in (("validate", "check every row"), ("check", "decode every image; exit code 1 on a gap")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("file", type=Path, help="pairs file, folder of tar shards, or a quoted glob of them")
        command.add_argument("--split", help="needed for Karpathy files: train, val or test")
    command = commands.add_parser("tokenizer", help="train a WordPiece tokenizer on captions")
    command.add_argument("files", type=Path, nargs="+", help="pairs files, or text with one caption a line")
    command.add_argument("--size", type=int, required=True, help="largest number of tokens")
    command.add_argument("--split", help="needed for Karpathy files")
    command.add_argument("--to", type=Path, required=True, help="folder to write")
    command = commands.add_parser("export", help="write the embedded data set as JPEG and JSON Lines")
    command.add_argument("source", choices=["scenes"])
    command.add_argument("--difficulty", choices=DIFFICULTIES, default="easy")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--split", choices=SPLITS, default="train")
    command.add_argument("--count", type=int, required=True)
    command.add_argument("--image-size-px", type=int, nargs="+", default=[96], help="side, or height and width")
    command.add_argument("--to", type=Path, required=True)
    command = commands.add_parser("build", help="turn a public data set's release into pairs files; exit 1 on a gap")
    command.add_argument("source", choices=["nlvr"])
    command.add_argument("--from", type=Path, required=True, dest="release")
    command.add_argument("--to", type=Path, required=True)
    return main


def run(args: argparse.Namespace) -> int:
    if args.command == "validate":
        print("\n".join(validate_pairs(args.file, args.split)))
    elif args.command == "check":
        report = check_pairs(args.file, args.split)
        print("\n".join(report.lines()))
        return int(bool(report.unreadable))
    elif args.command == "tokenizer":
        train_tokenizer(args.files, args.size, args.to, args.split)
    elif args.command == "export":
        print(
            export_scenes(
                args.difficulty, args.seed, args.split, args.count, tuple(args.image_size_px * 2)[:2], args.to
            )
        )
    else:
        counts = build_nlvr(args.release, args.to)
        print("\n".join(counts.lines()))
        return int(not counts.is_complete)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(parser().parse_args()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
