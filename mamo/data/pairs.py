"""A random-access data set of image-caption pairs; a sample is a pure function of (index, generator).

Legend: H, W height and width of the image given to the network, in pixels.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset

from mamo.data.images import BadSampleError, decode_image
from mamo.data.pair_record import PairRecord
from mamo.data.pairs_reader import clean_caption
from mamo.data.records import relative_image_path
from mamo.data.shard_index import ShardMember, read_member
from mamo.data.shards import TarShardDataset
from mamo.data.transforms import eval_transform

MAX_REPLACEMENTS = 100  # so many bad samples in a row mean a missing folder, not a bad file
Loaded = TypeVar("Loaded")
Transform = Callable[[Tensor, tuple[int, int], np.random.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Sample:
    """`image` uint8 [3, H, W]; `image_id` and `caption_id` are 63-bit hashes (equal means: same picture, same words).

    `sample_id` is the index whose pair this is; `skipped` names the bad samples it stands in for (see BadSamplePolicy).
    """

    image: Tensor
    caption: str
    image_id: int
    caption_id: int
    sample_id: int
    skipped: tuple[str, ...]


def hash_id(text: str) -> int:
    """The first 63 bits of the text's BLAKE2b digest: fits int64, equal in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def load_image(image: str | ShardMember) -> Tensor:
    """Decodes a record's image to uint8 [3, H, W] at its own size. Raises BadSampleError, naming it."""
    if isinstance(image, str):
        return decode_image(Path(image))
    try:
        return decode_image(read_member(image), name=str(image))
    except OSError as error:
        raise BadSampleError(f"{image}: {error}") from error


def load_or_substitute(
    index: int, n: int, on_bad: Literal["raise", "skip"], load: Callable[[int, tuple[str, ...]], Loaded]
) -> Loaded:
    """What `load(index, skipped)` gives for the first good index of `n` from `index` on, wrapping around.

    Raises BadSampleError at the first bad one where `on_bad` is "raise", or after MAX_REPLACEMENTS bad ones in a row.
    """
    skipped: list[str] = []
    for step in range(min(n, MAX_REPLACEMENTS)):
        try:
            return load((index + step) % n, tuple(skipped))
        except BadSampleError as error:
            if on_bad == "raise":
                raise
            skipped.append(str(error))
    raise BadSampleError(f"{len(skipped)} samples in a row, from {index} on, cannot be used; the last: {skipped[-1]}")


class PairDataset:
    """Pairs of images and captions.

    `transform(image uint8 [3, ?, ?], image_size_px, rng)` gives uint8 [3, H, W]; see `transforms`. With `on_bad`
    "raise" a bad sample raises BadSampleError; with "skip" the next good index takes its place (wrapping around), so that
    batches keep their size and every run sees the same replacement.
    """

    group_size = 1

    def __init__(
        self,
        records: Sequence[PairRecord] | ConcatDataset[PairRecord],
        image_size_px: tuple[int, int],
        transform: Transform = eval_transform,
        on_bad: Literal["raise", "skip"] = "raise",
    ) -> None:
        if not len(records):
            raise ValueError("a data set of pairs needs at least one record")
        self.records = records
        self.parts: list[Any] = records.datasets if isinstance(records, ConcatDataset) else [records]
        self.image_size_px = image_size_px
        self.transform = transform
        self.on_bad = on_bad

    def __len__(self) -> int:
        return len(self.records)

    def identity(self) -> Iterator[str]:
        """The records; of shards their tables, since reading every caption would take hours.

        Images are named from their file's folder, so that the same data at another place are the same.
        """
        for part in self.parts:
            if isinstance(part, TarShardDataset):
                yield part.fingerprint()
                continue
            for source, records in itertools.groupby(part, lambda record: record.source):
                file = Path(source)
                folder = file.parent.absolute()
                for record in records:
                    image = relative_image_path(folder, str(record.image))
                    image_id = image if record.image_id == str(record.image) else record.image_id
                    yield f"{file.name}\t{image}\t{image_id}\t{record.captions}\n"

    def dataset_names(self) -> list[str]:
        """What stands before the slash in image ids, as our builders write them (`coco/42`); else "other"."""
        found = set()
        for part in self.parts:
            ids = ("",) if isinstance(part, TarShardDataset) else (record.image_id for record in part)
            found |= {name if name and rest else "other" for name, rest in {i.partition("/")[::2] for i in ids}}
        return sorted(found)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Loads pair `index`; `rng` picks one of its captions and drives the transform.

        Raises BadSampleError where the policy is "raise", or where MAX_REPLACEMENTS indices in a row are bad.
        """
        return load_or_substitute(index, len(self), self.on_bad, lambda at, skipped: self._load_one(at, rng, skipped))

    def _load_one(self, index: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> Sample:
        try:
            record = self.records[index]
        except (OSError, ValueError) as error:  # a shard that is gone or damaged since it was indexed
            raise BadSampleError(f"sample {index}: {error}") from error
        caption = clean_caption(record.captions[int(rng.integers(len(record.captions)))])
        if not caption:
            raise BadSampleError(f"{record.source}:{record.line}: sample {index}: the caption is empty")
        image = self.transform(load_image(record.image), self.image_size_px, rng)
        return Sample(image, caption, hash_id(record.image_id), hash_id(caption.lower()), index, skipped)
