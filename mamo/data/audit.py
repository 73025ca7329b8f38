"""Images of an evaluation set that are also in the pre-training data: by id, and by what they look like.

What a picture looks like is a difference hash (Krawetz 2013): 8 rows of 9 grey pixels, one bit for each horizontal
neighbour that is brighter. It survives resizing and recompression, not cropping or mirroring. Pictures with nearly no
contrast (a blank page) have hashes of noise alone and are compared by id only.

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
"""Bits of 64 that may differ between two copies of one picture."""
_BANDS = MAX_DISTANCE + 1  # hashes within the distance agree in at least one of this many bands
_LEAST_CONTRAST = 4.0  # standard deviation of the 72 grey values, of 255


@dataclass(frozen=True, slots=True)
class AuditReport:
    """How many images of the evaluation set are in the pre-training data, and the first of them."""

    n_train: int
    n_eval: int
    by_id: int
    by_looks: int
    examples: tuple[str, ...]
    unreadable: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report."""
        share = f"{100 * self.by_looks / self.n_eval:.2f} %"
        return [
            f"pre-training images: {self.n_train}; evaluation images: {self.n_eval}",
            f"of these in the pre-training data by id: {self.by_id}",
            f"of these in the pre-training data by looks: {self.by_looks} ({share})",
            *(f"  {example}" for example in self.examples),
            *(f"unreadable: {name}" for name in self.unreadable),
        ]

    @property
    def is_complete(self) -> bool:
        """Whether the sets are disjoint and every image could be looked at."""
        return not (self.by_id or self.by_looks or self.unreadable)


def audit(
    train_file: Path, eval_file: Path, train_split: str | None = None, eval_split: str | None = None
) -> AuditReport:
    """Compare the images of two pairs files, each by its `image_id` and by its difference hash.

    Raises ValueError where a file cannot be read. Images that cannot be are listed in the report.
    """
    train, held_out = _images(train_file, train_split), _images(eval_file, eval_split)
    unreadable: list[str] = []
    train_hash, eval_hash = (dict(_hashes(images, unreadable)) for images in (train, held_out))
    names = list(train_hash)
    index = HashIndex(np.array([train_hash[name] for name in names], np.uint64))
    examples: list[str] = []
    n_looks = 0
    for name, value in eval_hash.items():
        found = index.near(value)
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


def difference_hash(picture: NDArray[np.uint8]) -> int | None:
    """64 bits of a picture uint8 [H, W, 3]; None where it has too little contrast to tell it from others."""
    small = np.asarray(Image.fromarray(picture).convert("L").resize((9, 8), Image.Resampling.BOX), np.float64)  # [8, 9]
    if small.std() < _LEAST_CONTRAST:
        return None
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


class HashIndex:
    """Looks up 64-bit hashes within `MAX_DISTANCE` bits, without comparing all pairs.

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

    def near(self, value: int) -> int | None:
        """The row of a nearest hash within the distance, the first of equals; None where there is none."""
        candidates: set[int] = set()
        for (shift, mask), rows in zip(_band_masks(), self.bands):
            candidates.update(rows.get(value >> shift & mask, ()))
        distances = [((value ^ int(self.hashes[row])).bit_count(), row) for row in candidates]
        best = min(distances, default=(MAX_DISTANCE + 1, -1))
        return best[1] if best[0] <= MAX_DISTANCE else None


def _band_masks() -> Sequence[tuple[int, int]]:
    edges = [64 * k // _BANDS for k in range(_BANDS + 1)]
    return [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(edges)]
