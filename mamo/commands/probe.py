"""Probe a frozen network: `mamo probe patches|classes|zero-shot RUN`.

`classes` classifies images from frozen features of the image encoder, linearly and by nearest neighbours.
`zero-shot` classifies them by the ITC similarity to texts, prompt templates with the names of the classes.
`patches` reads colour, shape and pattern out of patches of the embedded world, linearly, at every layer of the image
encoder and the fusion: of the object that a patch shows, of its neighbour, and of an object that is masked.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce, positive


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, probe, print the tables."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    patches = commands.add_parser("patches", help="linear read-outs of patches of the embedded world")
    patches.add_argument("checkpoint", type=Path, help="a run folder (its last checkpoint) or a step folder")
    patches.add_argument("--scenes", type=positive, default=600, help="scenes to fit on (default: %(default)s)")
    patches.add_argument("--test-scenes", type=positive, default=300, help="scenes to judge on (default: %(default)s)")
    patches.add_argument("--difficulty", choices=["easy", "full"], help="of the embedded world (default: the run's)")
    patches.add_argument("--to", type=Path, metavar="FILE", help="JSON file for the numbers")
    patches.set_defaults(execute=_patches)
    classes = commands.add_parser("classes", help="linear and nearest-neighbour accuracy on images with labels")
    zero_shot = commands.add_parser("zero-shot", help="accuracy by prompt templates, without training")
    labelled = "a folder of class folders, or a CSV file with the header image,label"
    for command in (classes, zero_shot):
        command.add_argument("model", help="a run, a step, an export, or a name on the hub")
    classes.add_argument("--train", type=Path, required=True, help=labelled)
    classes.add_argument("--test", type=Path, required=True, help=labelled)
    zero_shot.add_argument("--images", type=Path, required=True, help=labelled)
    zero_shot.add_argument("--templates", type=Path, required=True, help="texts with {} for the class, one a line")
    classes.set_defaults(execute=_classes)
    zero_shot.set_defaults(execute=_zero_shot)
    arguments = parser.parse_args(argv)
    announce("probe", arguments.command)
    arguments.execute(arguments)


def _patches(arguments: argparse.Namespace) -> None:
    from mamo.config.schema import MamoConfig
    from mamo.evaluation.patch_probes import probe_patches, tables
    from mamo.tasks.registry import load_stored_config
    from mamo.tasks.restore import random_backbone, restore_task
    from mamo.training import checkpoint
    from mamo.training.precision import choose_device
    from mamo.training.run_dir import atomic_write_text

    folder = checkpoint.resolve(arguments.checkpoint)
    config = load_stored_config(folder)
    if not isinstance(config, MamoConfig):
        raise ValueError(f"{folder}: task {config.task} has no image encoder and fusion to probe; give a run of MAMO")
    _, predictor = restore_task(folder, config, choose_device("auto"))
    words = predictor.processor.tokenizer
    random = random_backbone(config, folder, len(words), words.pad_token_id).to(predictor.device)
    difficulty = arguments.difficulty or config.data.difficulty
    sizes = (arguments.scenes, arguments.test_scenes)
    rows = probe_patches(predictor.network.backbone, random, predictor.processor, difficulty, *sizes)
    if arguments.to is not None:
        document = {"checkpoint": str(folder), "difficulty": difficulty, "scenes": sizes[0], "test_scenes": sizes[1]}
        numbers = [dataclasses.asdict(row) for row in rows]
        atomic_write_text(arguments.to, json.dumps({**document, "rows": numbers}, indent=1) + "\n")
    print(f"accuracy in percent of {folder} ({difficulty}, {sizes[1]:,} scenes) / with random weights\n")
    print(tables(rows))


def _classes(arguments: argparse.Namespace) -> None:
    from mamo.data.class_images import read_labelled_images
    from mamo.inference.features import probe_classes
    from mamo.inference.loading import load

    train, test = (read_labelled_images(path) for path in (arguments.train, arguments.test))
    found = probe_classes(load(arguments.model), train, test)
    print(f"{len(train.classes)} classes, {len(train.images):,} training images, {len(test.images):,} test images")
    _print(found)


def _zero_shot(arguments: argparse.Namespace) -> None:
    from mamo.data.class_images import read_labelled_images
    from mamo.inference.features import classify_zero_shot, read_templates
    from mamo.inference.loading import load

    images, templates = read_labelled_images(arguments.images), read_templates(arguments.templates)
    found = classify_zero_shot(load(arguments.model), images, templates)
    print(f"{len(images.classes)} classes, {len(images.images):,} images, {len(templates.texts)} templates")
    _print(found)


def _print(accuracies: dict[str, float]) -> None:
    for name, value in accuracies.items():
        print(f"{name:16} {value:6.1f}")
