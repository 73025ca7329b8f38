"""A data set of image-caption pairs with random access. A sample is a pure function of (index, generator).

Legend: H, W height and width of the network's input image, in pixels.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset

from mamo.data.captions import draw_caption, draw_sub_caption, split_sentences
from mamo.data.cleaning import Clean
from mamo.data.images import BadSampleError, decode_image
from mamo.data.pair_lines import LinePairs
from mamo.data.pair_record import PairRecord, data_set_of
from mamo.data.pairs_reader import clean_caption
from mamo.data.records import relative_image_path
from mamo.data.shard_index import ShardMember, read_member
from mamo.data.shards import TarShardDataset
from mamo.data.transforms import eval_transform

MAX_REPLACEMENTS = 100  # more bad samples in a row indicate a missing folder, not a bad file
_INDEXED = (TarShardDataset, LinePairs)
Loaded = TypeVar("Loaded")
Transform = Callable[[Tensor, tuple[int, int], np.random.Generator], Tensor]
"""(image uint8 [3, ?, ?], (H, W), generator) -> uint8 [3, H, W]"""
ChangeCaption = Callable[[str, np.random.Generator], str]


@dataclass(frozen=True, slots=True)
class Sample:
    """An image uint8 [3, H, W] with one caption.

    `image_id` and `caption_id` are 63-bit hashes, equal for the same image or the same words; `caption_ids` are those
    of all captions of the record. `short` is the text of `masking.text_for_masked_image: short`, `foil` a text that is
    false of the image; empty where none is known. `sample_id` is the index in the data set. `skipped` has one line for
    each bad sample that this one replaces, see `BadSamplePolicy`.
    """

    image: Tensor
    caption: str
    image_id: int
    caption_id: int
    sample_id: int
    skipped: tuple[str, ...]
    foil: str = ""
    caption_ids: tuple[int, ...] = field(default=(), kw_only=True)
    short: str = field(default="", kw_only=True)


def hash_id(text: str) -> int:
    """Return the first 63 bits of the text's BLAKE2b digest (an int64), the same on all machines."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def apply_transform(
    transform: Transform | None, image: Tensor, image_size_px: tuple[int, int], rng: np.random.Generator
) -> Tensor:
    """Augment and resize uint8 [3, ?, ?] to uint8 [3, H, W]; without a transform, only resize."""
    return eval_transform(image, image_size_px) if transform is None else transform(image, image_size_px, rng)


def load_image(image: str | ShardMember) -> Tensor:
    """Decode the image of a record to uint8 [3, ?, ?] in its own size. Raises BadSampleError with its name."""
    if isinstance(image, str):
        return decode_image(Path(image))
    try:
        return decode_image(read_member(image), name=str(image))
    except OSError as error:
        raise BadSampleError(f"{image}: {error}") from error


def load_or_substitute(
    index: int, n: int, on_bad: Literal["raise", "skip"], load: Callable[[int, tuple[str, ...]], Loaded]
) -> Loaded:
    """Load sample `index` of `n`, or with `on_bad` "skip" the next readable one (cyclic).

    `load(index, skipped)` loads one sample; `skipped` has one line for each bad sample before it.

    Raises:
        BadSampleError: a bad sample with `on_bad` "raise", or `MAX_REPLACEMENTS` bad samples in a row.
    """
    skipped: list[str] = []
    for step in range(min(n, MAX_REPLACEMENTS)):
        try:
            return load((index + step) % n, tuple(skipped))
        except BadSampleError as error:
            if on_bad == "raise":
                raise
            skipped.append(str(error))
    raise BadSampleError(
        f"{len(skipped)} samples in a row, from {index} on, cannot be read; check that the images exist; "
        f"the last: {skipped[-1]}"
    )


class PairDataset:
    """Data set of image-caption pairs.

    `transform` augments images; see `mamo.data.transforms`. By default they are only resized. With `on_bad` "raise" a
    bad sample raises BadSampleError. With "skip" the next readable sample replaces it (cyclic), so that batches keep
    their size and all runs use the same replacement. `sub_caption_sentences` is `data.sub_caption_sentences`.
    `change` augments the drawn caption. Records are those of `sources` (name, number of records), by default of one.
    """

    group_size = 1

    def __init__(
        self,
        records: Sequence[PairRecord] | ConcatDataset[PairRecord],
        image_size_px: tuple[int, int],
        transform: Transform | None = None,
        on_bad: Literal["raise", "skip"] = "raise",
        clean: Clean = clean_caption,
        sub_caption_sentences: int = 0,
        sources: Sequence[tuple[str, int]] = (),
        change: ChangeCaption | None = None,
    ) -> None:
        if not len(records):
            raise ValueError("records: no image-caption pairs; give at least one")
        self.records = records
        self.parts: list[Any] = records.datasets if isinstance(records, ConcatDataset) else [records]
        self.image_size_px = image_size_px
        self.transform = transform
        self.on_bad = on_bad
        self.clean = clean
        self.sub_caption_sentences = sub_caption_sentences
        self.change = change
        self.sources = list(sources) or [("pairs", len(records))]

    def __len__(self) -> int:
        return len(self.records)

    def has_foils(self) -> bool:
        """Return whether some pair has a foil; pairs of shards have none."""
        return any(
            part.has_foils if isinstance(part, LinePairs) else any(record.foils for record in part)
            for part in self.parts
            if not isinstance(part, TarShardDataset)
        )

    @functools.cached_property
    def n_caption_ids(self) -> int:
        """Number of ids by which the captions of a record are compared: those of the largest record.

        The text of a sub-caption or of a changed caption has an id of its own.
        """
        parts = {id(part): part for part in self.parts}.values()
        most = (
            part.most_captions if isinstance(part, _INDEXED) else max(len(set(row.captions)) for row in part)
            for part in parts
        )
        return max(most) + (self.sub_caption_sentences > 0 or self.change is not None)

    def fingerprint_items(self, by_row: bool = False) -> Iterator[str]:
        """Yield the texts of the data fingerprint: records, digests of JSON Lines, or the index tables of shards.

        Reading the captions of all shards would take hours. Images are named relative to the folder of their file, so
        that moved data keep their fingerprint. `by_row` yields the records of JSON Lines, as runs before
        version 0.3 have them.
        """
        for part in self.parts:
            if isinstance(part, TarShardDataset) or (isinstance(part, LinePairs) and not by_row):
                yield part.fingerprint()
                continue
            for source, records in itertools.groupby(part, lambda record: record.source):
                file = Path(source)
                folder = file.parent.absolute()
                for record in records:
                    image = relative_image_path(folder, str(record.image))
                    image_id = image if record.image_id == str(record.image) else record.image_id
                    foils = f"\t{record.foils}" if record.foils else ""
                    weights = f"\t{record.weights}" if record.weights else ""
                    yield f"{file.name}\t{image}\t{image_id}\t{record.captions}{foils}{weights}\n"

    def dataset_names(self) -> list[str]:
        """Return the prefixes of the image ids that our builders write (`coco` of `coco/42`), else "other".

        Pairs of COCO and Flickr30k in other layouts are recognised by their ids or by the names of their images.
        """
        found: set[str] = set()
        for part in self.parts:
            if isinstance(part, TarShardDataset):
                found.add("other")
            elif isinstance(part, LinePairs):
                found |= part.data_sets
            else:
                found |= {data_set_of(record.image_id, str(record.image)) for record in part}
        return sorted(found)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Load pair `index`; `rng` draws caption, augmentation and foil. Raises as `load_or_substitute`."""
        return load_or_substitute(index, len(self), self.on_bad, lambda at, skipped: self._load_one(at, rng, skipped))

    def _load_one(self, index: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> Sample:
        try:
            record = self.records[index]
        except (OSError, ValueError) as error:  # a shard that was removed or damaged after indexing
            raise BadSampleError(f"sample {index}: {error}") from error
        caption = self.clean(draw_caption(record.captions, record.weights, rng))
        caption = draw_sub_caption(caption, self.sub_caption_sentences, rng)
        caption = self.change(caption, rng) if self.change is not None else caption
        if not caption:
            raise BadSampleError(
                f"{record.source}:{record.line}: sample {index}: the caption is empty; add words or remove the row"
            )
        short = split_sentences(caption)[0] if caption else ""
        if len(record.captions) > 1:
            short = min(filter(None, map(self.clean, record.captions)), key=len)
        image = apply_transform(self.transform, load_image(record.image), self.image_size_px, rng)
        foil = self.clean(record.foils[int(rng.integers(len(record.foils)))]) if record.foils else ""
        if foil and foil.lower() in {self.clean(text).lower() for text in record.captions}:
            foil = ""  # equal once cleaned and cut: true of the image
        ids = tuple(hash_id(self.clean(text).lower()) for text in record.captions) if self.n_caption_ids > 1 else ()
        own = hash_id(record.image_id), hash_id(caption.lower())
        return Sample(image, caption, *own, index, skipped, foil, caption_ids=ids, short=short)
