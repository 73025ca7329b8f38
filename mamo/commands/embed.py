"""Write frozen features of images, captions and pairs: `mamo embed RUN --images FOLDER_OR_FILE --to OUT.safetensors`.

A folder gives `image`; a file of pairs, or tar shards, also `text` and `fused`, one row a caption, and `image_index`.
With ITC there are `image_itc` and `text_itc` too. OUT.jsonl names the images and captions, one row an image.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mamo.commands.shared import announce


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read the arguments, write the features, print their shapes."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run, a step, an export, or a name on the hub")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images, a file of pairs, or tar shards")
    parser.add_argument("--to", type=Path, required=True, help="file to write, OUT.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    arguments = parser.parse_args(argv)
    announce("embed", arguments.images)
    from mamo.inference.features import embed, read_images, write_features  # here, so that --help imports no torch
    from mamo.inference.loading import load

    records = read_images(arguments.images)
    features = embed(load(arguments.model), records)
    listed = write_features(arguments.to, features, records, arguments.model, arguments.overwrite)
    for name, values in features.items():
        print(f"{name:12} {list(values.shape)}")
    print(f"{arguments.to}, {listed}")
