"""Training samples of the downstream tasks: records, from files or from the embedded world, with their images.

The embedded world speaks in the same records as the files: an image's name is then the index of its scene.

Legend: I images of a record, H, W height and width of the image given to the network, in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mamo.data.images import BadSampleError, decode_image
from mamo.data.pairs import Transform, load_or_substitute
from mamo.data.records import (
    ReasoningRecord,
    TaskRecord,
    image_path,
    read_task_records,
    relative_image_path,
)
from mamo.data.transforms import eval_transform

Record = TypeVar("Record", bound=TaskRecord)
LoadImage = Callable[[str], Tensor]
"""An image's name in a record -> uint8 [3, ?, ?]; raises BadSampleError naming it."""


@dataclass(frozen=True, slots=True)
class RecordSample(Generic[Record]):
    """`images` uint8 [I, 3, H, W]; `sample_id` is the record's index; `skipped` as `Sample` has it."""

    record: Record
    images: Tensor
    sample_id: int
    skipped: tuple[str, ...]


class RecordDataset(Generic[Record]):
    """Records with their images; a sample is a pure function of (index, generator)."""

    group_size = 1

    def __init__(
        self,
        records: Sequence[Record],
        load_image: LoadImage,
        image_size_px: tuple[int, int],
        *,
        transform: Transform = eval_transform,
        on_bad: Literal["raise", "skip"] = "raise",
        folder: Path | None = None,
    ) -> None:
        """Take the records as they are.

        Args:
            records: what the samples are.
            load_image: reads an image by its name in a record.
            image_size_px: (height, width) of the images given to the network.
            transform: augments and resizes; see `mamo.data.transforms`.
            on_bad: what happens to a record whose image cannot be read; see `load_or_substitute`.
            folder: the records' file lies there; None for the embedded world.
        """
        self.records = records
        self.load_image = load_image
        self.image_size_px = image_size_px
        self.on_bad = on_bad
        self.transform = transform
        self.folder = folder

    def __len__(self) -> int:
        return len(self.records)

    def identity(self) -> Iterator[str]:
        """The records."""
        for record in self.relocated_records():
            yield record.model_dump_json() + "\n"

    def relocated_records(self) -> Iterator[Record]:
        """The records, their images named from the first file's folder: the same data at another place are the same."""
        for record in self.records:
            if self.folder is None:
                yield record
            else:
                yield with_images(record, [relative_image_path(self.folder, name) for name in image_names(record)])

    def dataset_names(self) -> list[str]:
        """The embedded world, or files of records."""
        return ["scenes"] if self.folder is None else ["records"]

    def load(self, index: int, rng: np.random.Generator) -> RecordSample[Record]:
        """Loads record `index`; `rng` drives the augmentation. Raises BadSampleError as `PairDataset.load`."""
        return load_or_substitute(index, len(self), self.on_bad, lambda at, skipped: self._load_one(at, rng, skipped))

    def _load_one(self, index: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> RecordSample[Record]:
        record = self.records[index]
        try:
            loaded = [self.load_image(name) for name in image_names(record)]
        except BadSampleError as error:
            raise BadSampleError(f"{record.key} {getattr(record, record.key)}: {error}") from error
        images = torch.stack([self.transform(image, self.image_size_px, rng) for image in loaded])
        return RecordSample(record, images, index, skipped)


def image_names(record: Any) -> list[str]:
    """The images of any kind of record, in order."""
    names: list[str] = record.images if isinstance(record, ReasoningRecord) else [record.image]
    return names


def with_images(record: Record, names: list[str]) -> Record:
    """The record with its images named so."""
    return record.model_copy(update={"images": names} if isinstance(record, ReasoningRecord) else {"image": names[0]})


def file_records(files: Sequence[str], kind: type[Record]) -> tuple[list[Record], LoadImage]:
    """The records of files, their images' names made absolute. Raises ValueError as `read_task_records`."""
    records: list[Record] = []
    for file in map(Path, files):
        for record in read_task_records(file, kind):
            records.append(with_images(record, [str(image_path(file, name)) for name in image_names(record)]))
    return records, _decode


def _decode(name: str) -> Tensor:
    return decode_image(Path(name))


def load_unique_images(
    records: Sequence[Record], load_image: LoadImage, image_size_px: tuple[int, int] | None
) -> tuple[list[Tensor], dict[str, int]]:
    """Each image of some records once, for evaluation: uint8 [3, H, W] (of its own size without `image_size_px`), and
    where each is, by name. Raises BadSampleError, naming the record, for one that cannot be read.
    """
    images: list[Tensor] = []
    place: dict[str, int] = {}
    for record in records:
        for name in image_names(record):
            if name in place:
                continue
            try:
                image = load_image(name)
            except BadSampleError as error:
                raise BadSampleError(f"{record.key} {getattr(record, record.key)}: {error}") from error
            place[name] = len(images)
            images.append(image if image_size_px is None else eval_transform(image, image_size_px))
    return images, place
