"""The embedded data set on disk: ordinary JPEG files and JSON Lines in the schema of `records`."""

import json
from pathlib import Path

from PIL import Image

from mamo.data.grammar import captions
from mamo.data.rendering import render
from mamo.data.scenes import Difficulty, SceneWorld, Split

_JPEG_QUALITY = 95


def export_scenes(
    difficulty: Difficulty, seed: int, split: Split, n: int, image_size_px: tuple[int, int], to: Path
) -> Path:
    """Writes scenes 0 to n - 1 of a split, with five captions each; returns the path of the `pairs.jsonl`.

    Pictures of an earlier export into the same folder are overwritten. Raises ValueError for a count or side below 1.
    """
    if n < 1 or min(image_size_px) < 1:
        raise ValueError(f"count and image size must be at least 1, got {n} and {image_size_px}")
    world = SceneWorld(difficulty, seed)
    (to / "images").mkdir(parents=True, exist_ok=True)
    pairs = to / "pairs.jsonl"
    with pairs.open("w", encoding="utf-8") as file:
        for index in range(n):
            scene = world.scene(split, index)
            name = f"images/{split}-{index:07d}.jpg"
            # 4:4:4: halving the colour resolution would smear small objects into each other
            Image.fromarray(render(scene, image_size_px)).save(to / name, quality=_JPEG_QUALITY, subsampling=0)
            texts = [caption.text for caption in captions(scene)]
            identity = f"scenes-{difficulty}-{seed}-{split}-{index}"
            file.write(json.dumps({"image": name, "caption": texts, "image_id": identity}) + "\n")
    return pairs
