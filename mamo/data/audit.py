"""Overlap of evaluation and pre-training images, by id and by perceptual hash.

The perceptual hash is a difference hash (Krawetz 2013): 8 rows of 9 grey pixels, one bit for each pixel with a brighter
right neighbour. It is robust to resizing and recompression, not to cropping or mirroring. Images with almost no
contrast (a blank page) have random hashes, so only their ids are compared.

Legend: M, N images of the two sets.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mamo.data.images import BadSampleError
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import read_pairs
from mamo.data.shard_index import ShardMember

MAX_DISTANCE = 4
"""Largest number of different bits, of 64, between two copies of one image."""
_BANDS = MAX_DISTANCE + 1  # two hashes within the distance agree in at least one of so many bands
_MIN_CONTRAST = 4.0  # standard deviation of the 72 grey values, of 255


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Number of evaluation images in the pre-training data, by id and by hash, with the first ten pairs."""

    n_train: int
    n_eval: int
    by_id: int
    by_hash: int
    examples: tuple[str, ...]
    unreadable: tuple[str, ...]

    def lines(self) -> list[str]:
        """Format the report."""
        share = f"{100 * self.by_hash / self.n_eval:.2f} %"
        return [
            f"pre-training images: {self.n_train}; evaluation images: {self.n_eval}",
            f"of these in the pre-training data by id: {self.by_id}",
            f"of these in the pre-training data by difference hash: {self.by_hash} ({share})",
            *(f"  {example}" for example in self.examples),
            *(f"unreadable: {name}" for name in self.unreadable),
        ]

    @property
    def is_complete(self) -> bool:
        """Return whether the sets are disjoint and all images could be decoded."""
        return not (self.by_id or self.by_hash or self.unreadable)


def find_overlap(
    train_file: Path, eval_file: Path, train_split: str | None = None, eval_split: str | None = None
) -> AuditReport:
    """Find the images of an evaluation set that are also in the pre-training data.

    Images are compared by `image_id` and by difference hash. Images that cannot be decoded are listed in the report.

    Raises:
        ValueError: a pairs file is not valid, see `read_pairs`.
    """
    train, held_out = _images(train_file, train_split), _images(eval_file, eval_split)
    unreadable: list[str] = []
    train_hash, eval_hash = (dict(_hashes(images, unreadable)) for images in (train, held_out))
    names = list(train_hash)
    index = HashIndex(np.array([train_hash[name] for name in names], np.uint64))
    examples: list[str] = []
    n_looks = 0
    for name, value in eval_hash.items():
        found = index.nearest(value)
        n_looks += found is not None
        if found is not None and len(examples) < 10:
            examples.append(f"{held_out[name]} looks like {train[names[found]]}")
    by_id = len(train.keys() & held_out.keys())
    return AuditReport(len(train), len(held_out), by_id, n_looks, tuple(examples), tuple(unreadable))


def _images(file: Path, split: str | None) -> dict[str, str | ShardMember]:
    return {record.image_id: record.image for record in read_pairs(file, split)}


def _hashes(images: Mapping[str, str | ShardMember], unreadable: list[str]) -> Iterator[tuple[str, int]]:
    for image_id, image in images.items():
        try:
            value = difference_hash(load_image(image).permute(1, 2, 0).numpy())
        except BadSampleError as error:
            unreadable.append(str(error))
            continue
        if value is not None:
            yield image_id, value


def difference_hash(image: NDArray[np.uint8]) -> int | None:
    """Compute the 64-bit hash of an image uint8 [H, W, 3]; None if its contrast is too low."""
    small = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.float64)  # [8, 9]
    if small.std() < _MIN_CONTRAST:
        return None
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


class HashIndex:
    """Lookup of 64-bit hashes within `MAX_DISTANCE` bits, without comparing all pairs.

    Two hashes that differ in at most `MAX_DISTANCE` bits agree in at least one of `MAX_DISTANCE + 1` bands.
    """

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self.hashes = hashes
        self.bands: list[dict[int, list[int]]] = []
        for shift, mask in _band_masks():
            rows: defaultdict[int, list[int]] = defaultdict(list)
            for row, value in enumerate(hashes.tolist()):
                rows[value >> shift & mask].append(row)
            self.bands.append(dict(rows))

    def nearest(self, value: int) -> int | None:
        """Return the row of the nearest hash, the lowest row of equals; None if none is within the distance."""
        candidates: set[int] = set()
        for (shift, mask), rows in zip(_band_masks(), self.bands):
            candidates.update(rows.get(value >> shift & mask, ()))
        distances = [((value ^ int(self.hashes[row])).bit_count(), row) for row in candidates]
        best = min(distances, default=(MAX_DISTANCE + 1, -1))
        return best[1] if best[0] <= MAX_DISTANCE else None


def _band_masks() -> Sequence[tuple[int, int]]:
    """Return (shift, mask) of each band of bits."""
    edges = [64 * k // _BANDS for k in range(_BANDS + 1)]
    return [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(edges)]
