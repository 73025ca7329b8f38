"""Prepare data: validate, check and split files, index shards, train a tokenizer, export scenes, build data sets."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from mamo.commands.shared import announce, positive
from mamo.data.builders.aro import build_aro, build_aro_order
from mamo.data.builders.bivlc import build_bivlc
from mamo.data.builders.captions import build_karpathy, build_vg
from mamo.data.builders.cola import build_cola
from mamo.data.builders.colorswap import build_colorswap
from mamo.data.builders.emoji import build_emoji
from mamo.data.builders.mmvp import build_mmvp
from mamo.data.builders.nlvr import NlvrCounts, build_nlvr
from mamo.data.builders.nlvr2 import build_nlvr2
from mamo.data.builders.questions import build_vgqa, build_vqa2
from mamo.data.builders.refcoco import DEFAULT_SPLIT_BY, build_refcoco
from mamo.data.builders.report import BuildReport
from mamo.data.builders.snli_ve import build_snli_ve
from mamo.data.builders.sugarcrepe import build_sugarcrepe, build_sugarcrepe_pp
from mamo.data.builders.svo import build_svo
from mamo.data.builders.valse import build_valse
from mamo.data.builders.vsr import build_vsr
from mamo.data.builders.web import build_cc3m, build_sbu
from mamo.data.builders.whatsup import build_whatsup
from mamo.data.builders.winoground import build_winoground
from mamo.data.records import TASK_RECORDS
from mamo.world.export import LAYOUTS
from mamo.world.scene import DIFFICULTIES, SPLITS

ITEMS = "items"
Outcome = tuple[list[str], bool]
"""The lines to print, and whether nothing is missing."""
BUILDERS: dict[str, Callable[[Path, Path, bool], BuildReport | NlvrCounts]] = {
    "coco": functools.partial(build_karpathy, "coco"),
    "flickr30k": functools.partial(build_karpathy, "flickr30k"),
    "vg": build_vg,
    "cc3m": build_cc3m,
    "sbu": build_sbu,
    "emoji": build_emoji,
    "vqa2": build_vqa2,
    "vgqa": build_vgqa,
    "nlvr": build_nlvr,
    "nlvr2": build_nlvr2,
    "refcoco": build_refcoco,
    "sugarcrepe": build_sugarcrepe,
    "sugarcrepe-pp": build_sugarcrepe_pp,
    "aro": build_aro,
    "aro-coco-order": functools.partial(build_aro_order, "aro-coco-order"),
    "aro-flickr30k-order": functools.partial(build_aro_order, "aro-flickr30k-order"),
    "winoground": build_winoground,
    "valse": build_valse,
    "vsr": build_vsr,
    "whatsup": build_whatsup,
    "svo-probes": build_svo,
    "bivlc": build_bivlc,
    "colorswap": build_colorswap,
    "mmvp-vlm": build_mmvp,
    "cola": build_cola,
    "snli_ve": build_snli_ve,
}


SHARD_BUILDERS = ("parquet", "csv", "huggingface")
Reading = tuple[str | None, dict[str, float], list[str]]
"""Split, caption keys with weights, and columns of `read_pairs`."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Read the arguments, do the work, print its lines; return 1 on a gap."""
    arguments = make_parser(prog).parse_args(argv)
    announce("data", arguments.command)
    lines, is_complete = arguments.execute(arguments)
    print("\n".join(lines))
    return 0 if is_complete else 1


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command line; `execute` of its result does the work."""
    main = argparse.ArgumentParser(prog, description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    def add(name: str, execute: Callable[[argparse.Namespace], Outcome], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(execute=execute)
        return command

    validate = add("validate", _validate, "check every row of a pairs file, or of (a glob of) tar shards")
    check = add("check", _check, "decode every image; exit code 1 on a gap")
    tokenizer = add("tokenizer", _tokenizer, "train WordPiece on pairs files or text, one caption a line")
    tokenizer.add_argument("files", type=Path, nargs="+")
    tokenizer.add_argument("--size", type=int, required=True, help="largest number of tokens")
    split = add("split", _split, "split a pairs file into training and held-out pairs, by image")
    split.add_argument("file", type=Path, help="JSON Lines, CSV or TSV; the two files are written next to it")
    split.add_argument("--held-out", type=float, default=0.1, help="share of the images (default: %(default)s)")
    split.add_argument("--overwrite", action="store_true", help="replace existing files")
    index = add("index", _index, "write the position of each pair in a folder of tar shards")
    index.add_argument("folder", type=Path)
    index.add_argument("--workers", type=positive, default=1, help="processes that read shards")
    overlap = add("audit", _audit, "find images that pre-training and evaluation share; exit code 1 if any by id")
    overlap.add_argument("train", type=Path, help="pairs file of the pre-training data")
    overlap.add_argument("eval", type=Path, help="pairs file of the evaluation set")
    overlap.add_argument("--train-split", help="of a Karpathy file")
    overlap.add_argument("--eval-split", help="of a Karpathy file")
    overlap.add_argument(
        "--distance", type=int, help="different bits, of 64, up to which pictures look alike (default: 4)"
    )
    overlap.add_argument("--to", type=Path, metavar="FILE", help="file for all pairs, one line of JSON each")
    overlap.add_argument("--overwrite", action="store_true", help="replace an existing file")
    export = add("export", _export, "write the embedded data set as files")
    export.add_argument("source", choices=["scenes"])
    export.add_argument("--difficulty", choices=DIFFICULTIES, default="easy")
    export.add_argument("--split", choices=SPLITS, default="train")
    export.add_argument("--layout", choices=LAYOUTS, default="pairs", help="JSON Lines, or a data set's official files")
    for name, default in (("--seed", 0), ("--count", 1000), ("--image-size-px", 96)):
        export.add_argument(name, type=int, default=default)
    build = add("build", _build, "convert a public release to records, or files to shards; exit code 1 on a gap")
    build.add_argument("source", choices=[*BUILDERS, *SHARD_BUILDERS])
    build.add_argument(
        "--from", type=Path, required=True, dest="release", nargs="+", help="folder; of shards also files"
    )
    build.add_argument(
        "--split-by", help=f"of refcoco: unc, google or umd (default: {DEFAULT_SPLIT_BY}, or the only one)"
    )
    shards = build.add_argument_group("to shards", f"of {', '.join(SHARD_BUILDERS)}")
    shards.add_argument("--image", help="column of the images (default: found by type or name)")
    shards.add_argument("--image-id", help="column: consecutive rows of one id become one pair")
    shards.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="rows to take; repeatable")
    shards.add_argument("--shard-mib", type=positive, default=1024, help="largest shard (default: %(default)s)")
    for reader in (validate, check, tokenizer, index, shards):
        reader.add_argument(
            "--caption",
            action="append",
            default=[],
            help="field of the captions (default: caption); repeatable; in build a path: conversations[-1].value",
        )
    for reader in (validate, check, split, tokenizer, shards):
        reader.add_argument("--columns", type=_names, default=[], help="of a table without a header: image,caption")
    for reader in (validate, check):
        reader.add_argument("file", type=Path)
        reader.add_argument("--task", choices=["pairs", *TASK_RECORDS, ITEMS], default="pairs", help="kind of its rows")
    for reader in (validate, check, tokenizer):
        reader.add_argument("--split", help="needed for Karpathy files: train, val or test")
    for writer in (tokenizer, export, build):
        writer.add_argument("--to", type=Path, required=True, help="folder to write")
        writer.add_argument("--overwrite", action="store_true", help="replace existing files")
    return main


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _read_as(arguments: argparse.Namespace) -> Reading:
    """Return how pairs are read."""
    return arguments.split, dict.fromkeys(arguments.caption, 1.0), arguments.columns


def _validate(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.validate import validate_items, validate_pairs, validate_records  # --help imports no torch

    if arguments.task == ITEMS:
        return validate_items(arguments.file), True
    if arguments.task == "pairs":
        return validate_pairs(arguments.file, *_read_as(arguments)), True
    return validate_records(arguments.file, arguments.task), True


def _check(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.validate import check_items, check_pairs, check_records

    if arguments.task == ITEMS:
        report = check_items(arguments.file)
        return report.lines(), report.is_complete
    is_pairs = arguments.task == "pairs"
    if is_pairs:
        report = check_pairs(arguments.file, *_read_as(arguments))
    else:
        report = check_records(arguments.file, arguments.task)
    return report.lines(), report.is_complete


def _tokenizer(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.tokenizer import train_tokenizer

    n_tokens = train_tokenizer(
        arguments.files, arguments.size, arguments.to, overwrite=arguments.overwrite, read_as=_read_as(arguments)
    )
    return [f"{arguments.to}: {n_tokens} tokens"], True


def _split(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.split import split_pairs

    return split_pairs(arguments.file, arguments.held_out, arguments.columns, arguments.overwrite), True


def _index(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.shards import index_folder

    pairs = index_folder(arguments.folder, arguments.workers, arguments.caption or ["caption"])
    return [f"{arguments.folder}: {len(pairs)} pairs in {len(pairs.shards)} shards"], True


def _audit(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.audit import MAX_DISTANCE, find_overlap

    distance = MAX_DISTANCE if arguments.distance is None else arguments.distance
    found = find_overlap(arguments.train, arguments.eval, arguments.train_split, arguments.eval_split, distance)
    if arguments.to is not None:
        found.write(arguments.to, arguments.overwrite)
    return found.lines(), found.is_complete


def _export(arguments: argparse.Namespace) -> Outcome:
    from mamo.world.export import export_scenes
    from mamo.world.scene import SceneWorld

    size = (arguments.image_size_px, arguments.image_size_px)
    world = SceneWorld(arguments.difficulty, arguments.seed)
    what = (world, arguments.split, arguments.count, size, arguments.to, arguments.layout, arguments.overwrite)
    return [str(export_scenes(*what))], True


def _build(arguments: argparse.Namespace) -> Outcome:
    if arguments.source in SHARD_BUILDERS:
        return _build_shards(arguments)
    given = [name for name in ("image", "image_id", "where", "caption", "columns") if getattr(arguments, name)]
    if given or len(arguments.release) > 1:
        what = f"--{given[0].replace('_', '-')}" if given else "--from"
        raise ValueError(f"{what}: {arguments.source} reads the official files of one folder; remove it")
    build = BUILDERS[arguments.source]
    if arguments.split_by is not None:
        if arguments.source != "refcoco":
            raise ValueError(f"--split-by: {arguments.source} has one way to split; remove it")
        build = functools.partial(build_refcoco, split_by=arguments.split_by)
    built = build(arguments.release[0], arguments.to, arguments.overwrite)
    return built.lines(), built.is_complete


def _build_shards(arguments: argparse.Namespace) -> Outcome:
    from mamo.data.builders.tar_shards import Recipe, build_shards

    if arguments.split_by is not None:
        raise ValueError(f"--split-by: {arguments.source} has no such splits; use --where COLUMN=VALUE")
    lists = (tuple(arguments.where), tuple(arguments.columns))
    recipe = Recipe(arguments.image, tuple(arguments.caption), arguments.image_id, *lists)
    to, limits = arguments.to, (arguments.shard_mib, arguments.overwrite)
    return build_shards(arguments.source, arguments.release, to, recipe, *limits).lines(), True
