"""Training samples of the downstream tasks: records with their images.

Legend: I images of a record, H, W height and width of the network's input image, in pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mamo.data.images import BadSampleError, BadSamplePolicy, decode_image
from mamo.data.pairs import Transform, apply_transform, load_or_substitute
from mamo.data.records import (
    ReasoningRecord,
    TaskRecord,
    VqaRecord,
    image_path,
    read_task_records,
    relative_image_path,
)
from mamo.data.transforms import Resizing, eval_transform

Record = TypeVar("Record", bound=TaskRecord)
LoadImage = Callable[[str], Tensor]
"""Name of an image in a record -> uint8 [3, ?, ?]. Raises BadSampleError with the name."""


@dataclass(frozen=True, slots=True)
class RecordSample(Generic[Record]):
    """A record with its `images` uint8 [I, 3, H, W] and its index `sample_id`; `skipped` as in `Sample`."""

    record: Record
    images: Tensor
    sample_id: int
    skipped: tuple[str, ...]


class RecordDataset(Generic[Record]):
    """Data set of records with their images. A sample is a pure function of (index, generator)."""

    group_size = 1

    def __init__(
        self,
        records: Sequence[Record],
        load_image: LoadImage,
        image_size_px: tuple[int, int],
        *,
        transform: Transform | None = None,
        on_bad: Literal["raise", "skip"] = "raise",
        folder: Path | None = None,
        name: str = "records",
    ) -> None:
        """Store the arguments.

        Args:
            records: one for each sample.
            load_image: loads an image by its name in a record.
            image_size_px: (height, width) of the network's input image.
            transform: augments images, see `mamo.data.transforms`; None to only resize.
            on_bad: policy for a record whose image cannot be read; see `load_or_substitute`.
            folder: folder of the records' file; None if image names are not paths.
            name: name of the data set.
        """
        self.records = records
        self.load_image = load_image
        self.image_size_px = image_size_px
        self.on_bad = on_bad
        self.transform = transform
        self.folder = folder
        self.name = name

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint_items(self) -> Iterator[str]:
        """Yield the texts of the data fingerprint: the records as JSON."""
        for record in self.relocated_records():
            # runs of version 0.2 have fingerprints without this field
            is_new = isinstance(record, VqaRecord) and not record.multiple_choice_answer
            yield record.model_dump_json(exclude={"multiple_choice_answer"} if is_new else None) + "\n"

    def relocated_records(self) -> Iterator[Record]:
        """Yield the records with image paths relative to `folder`, which stay the same if the data are moved."""
        for record in self.records:
            if self.folder is None:
                yield record
            else:
                yield with_images(record, [relative_image_path(self.folder, name) for name in image_names(record)])

    def dataset_names(self) -> list[str]:
        """Return the name of the data set."""
        return [self.name]

    def load(self, index: int, rng: np.random.Generator) -> RecordSample[Record]:
        """Load record `index` with its images; `rng` draws the augmentation. Raises as `load_or_substitute`."""
        return load_or_substitute(index, len(self), self.on_bad, lambda at, skipped: self._load_one(at, rng, skipped))

    def _load_one(self, index: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> RecordSample[Record]:
        record = self.records[index]
        loaded = [_load_record_image(record, name, self.load_image) for name in image_names(record)]
        images = torch.stack([apply_transform(self.transform, image, self.image_size_px, rng) for image in loaded])
        return RecordSample(record, images, index, skipped)


def _load_record_image(record: TaskRecord, name: str, load_image: LoadImage) -> Tensor:
    """Load an image of a record; add the record to the message of a BadSampleError."""
    try:
        return load_image(name)
    except BadSampleError as error:
        raise BadSampleError(f"{record.key} {getattr(record, record.key)}: {error}") from error


def image_names(record: Any) -> list[str]:
    """Return the image names of a record of any kind, in order."""
    names: list[str] = record.images if isinstance(record, ReasoningRecord) else [record.image]
    return names


def with_images(record: Record, names: list[str]) -> Record:
    """Return a copy of the record with other image names."""
    return record.model_copy(update={"images": names} if isinstance(record, ReasoningRecord) else {"image": names[0]})


def file_records(files: Sequence[str], kind: type[Record]) -> tuple[list[Record], LoadImage]:
    """Read the records of files, with absolute image paths. Raises ValueError as `read_task_records`."""
    records: list[Record] = []
    for file in map(Path, files):
        for record in read_task_records(file, kind):
            records.append(with_images(record, [str(image_path(file, name)) for name in image_names(record)]))
    return records, _decode


def _decode(name: str) -> Tensor:
    return decode_image(Path(name))


def load_unique_images(
    records: Sequence[Record],
    load_image: LoadImage,
    image_size_px: tuple[int, int] | None,
    policy: BadSamplePolicy | None = None,
    resizing: Resizing = "torchvision",
) -> tuple[list[Tensor], dict[str, int]]:
    """Load each image of the records once, for evaluation.

    Args:
        records: of which the images are loaded.
        load_image: loads an image by its name.
        image_size_px: (height, width) to resize to; None keeps the images' own size.
        policy: counts the images that cannot be read, and decides; None refuses the first.

    Returns:
        Images uint8 [3, H, W], and the index of each that could be read by name; see `readable`.

    Raises:
        BadSampleError: an image cannot be read, and `policy` does not skip it. The message contains the record.
    """
    images: list[Tensor] = []
    failed: set[str] = set()
    index_by_name: dict[str, int] = {}
    for record in records:
        for name in image_names(record):
            if name in index_by_name or name in failed:
                continue
            try:
                image = _load_record_image(record, name, load_image)
            except BadSampleError as error:
                if policy is None:
                    raise
                policy.record(0, [str(error)])
                failed.add(name)
                continue
            if policy is not None:
                policy.record(1, [])
            index_by_name[name] = len(images)
            images.append(image if image_size_px is None else eval_transform(image, image_size_px, resizing))
    return images, index_by_name


def readable(records: Sequence[Record], index_by_name: Mapping[str, int]) -> list[Record]:
    """Return the records all of whose images `load_unique_images` could read."""
    return [record for record in records if all(name in index_by_name for name in image_names(record))]
