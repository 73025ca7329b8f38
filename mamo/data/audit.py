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
from mamo.data.output import OutputFolder
from mamo.data.pairs import load_image
from mamo.data.pairs_reader import read_pairs, write_json_lines
from mamo.data.shard_index import ShardMember

MAX_DISTANCE = 4
"""Largest number of different bits, of 64, between two copies of one image."""
_MAX_LISTED = 10
_MIN_CONTRAST = 4.0  # standard deviation of the 72 grey values, of 255


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Number of images of both sets; the evaluation images in the pre-training data by id, and by looks.

    `by_id` has (evaluation image, pre-training image) of each; `by_looks` also the number of different bits of their
    hashes, at most `distance`, the most similar first. `n_plain` are the numbers of images of too low a contrast for
    a hash, of both sets.
    """

    n_train: int
    n_eval: int
    by_id: tuple[tuple[str, str], ...]
    by_looks: tuple[tuple[str, str, int], ...]
    unreadable: tuple[str, ...]
    distance: int
    n_plain: tuple[int, int]

    def lines(self) -> list[str]:
        """Format the report, with the first ten pairs by looks."""
        share = f"{100 * len(self.by_looks) / self.n_eval:.2f} %"
        hidden = len(self.by_looks) - _MAX_LISTED
        return [
            f"pre-training images: {self.n_train}; evaluation images: {self.n_eval}",
            f"of these in the pre-training data by id: {len(self.by_id)}",
            f"of these in the pre-training data by difference hash, at most {self.distance} of 64 bits different: "
            f"{len(self.by_looks)} ({share}); look at them, drawings and plain pictures are often alike",
            *(f"  {one} looks like {other} ({bits} bits)" for one, other, bits in self.by_looks[:_MAX_LISTED]),
            *([f"  and {hidden} more; --to FILE lists all, --distance 0 only equal hashes"] if hidden > 0 else []),
            *(
                [f"compared by id only, their contrast is too low for a hash: {self.n_plain[0]} and {self.n_plain[1]}"]
                if any(self.n_plain)
                else []
            ),
            *(f"unreadable: {name}" for name in self.unreadable),
        ]

    def write(self, file: Path, overwrite: bool = False) -> None:
        """Write each pair as one line of JSON: `eval`, `train`, and `distance` in bits, null where the ids are equal.

        Raises:
            ValueError: the file exists, and `overwrite` is False.
        """
        pairs = [*((*pair, None) for pair in self.by_id), *self.by_looks]
        rows = [{"eval": one, "train": other, "distance": bits} for one, other, bits in pairs]
        with OutputFolder(file.parent, overwrite) as output:
            write_json_lines(output.path(file.name), rows)

    @property
    def is_complete(self) -> bool:
        """Return whether no id is in both sets, and all images could be decoded. Equal looks prove nothing."""
        return not (self.by_id or self.unreadable)


def find_overlap(
    train_file: Path,
    eval_file: Path,
    train_split: str | None = None,
    eval_split: str | None = None,
    distance: int = MAX_DISTANCE,
) -> AuditReport:
    """Find the images of an evaluation set that are also in the pre-training data.

    Images are compared by `image_id` and by difference hash. Images that cannot be decoded are listed in the report.

    Args:
        train_file: pairs of the pre-training data.
        eval_file: pairs of the evaluation set.
        train_split: of a Karpathy file.
        eval_split: of a Karpathy file.
        distance: largest number of different bits, of 64, between two images that look alike.

    Raises:
        ValueError: a pairs file is not valid, see `read_pairs`, or the distance is not between 0 and 63.
    """
    if not 0 <= distance < 64:
        raise ValueError(f"distance must be between 0 and 63 of 64 bits, got {distance}")
    train, held_out = _images(train_file, train_split), _images(eval_file, eval_split)
    unreadable: list[str] = []
    train_hash = dict(_hashes(train, unreadable))
    n_plain = len(train) - len(train_hash) - len(unreadable)
    eval_hash = dict(_hashes(held_out, unreadable))
    both = n_plain, len(train) + len(held_out) - len(train_hash) - len(eval_hash) - len(unreadable) - n_plain
    names = list(train_hash)
    index = HashIndex(np.array([train_hash[name] for name in names], np.uint64), distance)
    by_looks = []
    for name, value in eval_hash.items():
        row = index.nearest(value)
        if row is not None:
            bits = (value ^ train_hash[names[row]]).bit_count()
            by_looks.append((str(held_out[name]), str(train[names[row]]), bits))
    by_looks.sort(key=lambda pair: pair[2])
    by_id = tuple((str(held_out[name]), str(train[name])) for name in held_out if name in train)
    return AuditReport(len(train), len(held_out), by_id, tuple(by_looks), tuple(unreadable), distance, both)


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
    """Lookup of 64-bit hashes within a distance of 0 to 63 bits, without comparing all pairs.

    Two hashes that differ in at most d bits agree in at least one of d + 1 bands.
    """

    def __init__(self, hashes: NDArray[np.uint64], distance: int = MAX_DISTANCE) -> None:
        self.hashes, self.distance = hashes, distance
        self.masks = _band_masks(distance + 1)
        self.bands: list[dict[int, list[int]]] = []
        for shift, mask in self.masks:
            rows: defaultdict[int, list[int]] = defaultdict(list)
            for row, value in enumerate(hashes.tolist()):
                rows[value >> shift & mask].append(row)
            self.bands.append(dict(rows))

    def nearest(self, value: int) -> int | None:
        """Return the row of the nearest hash, the lowest row of equals; None if none is within the distance."""
        candidates: set[int] = set()
        for (shift, mask), rows in zip(self.masks, self.bands):
            candidates.update(rows.get(value >> shift & mask, ()))
        distances = [((value ^ int(self.hashes[row])).bit_count(), row) for row in candidates]
        best = min(distances, default=(self.distance + 1, -1))
        return best[1] if best[0] <= self.distance else None


def _band_masks(n_bands: int) -> Sequence[tuple[int, int]]:
    """Return (shift, mask) of each band of bits."""
    edges = [64 * k // n_bands for k in range(n_bands + 1)]
    return [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(edges)]
