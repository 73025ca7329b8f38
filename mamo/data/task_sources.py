"""Training samples of the downstream tasks: records, from files or from the embedded world, with their images.

The embedded world speaks in the same records as the files: an image's name is then the index of its scene.

Legend: I images of a record, H, W height and width of the image given to the network, in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mamo.config import DataConfig
from mamo.data.expressions import expressions
from mamo.data.images import BadSample, decode_image
from mamo.data.loader import WORLD_SEED
from mamo.data.pairs import first_good
from mamo.data.rendering import render
from mamo.data.scene_questions import question
from mamo.data.scene_statements import pair_statements
from mamo.data.scenes import SceneWorld, Split
from mamo.data.task_records import (
    GroundingRecord,
    ReasoningRecord,
    TaskRecord,
    VqaRecord,
    image_path,
    name_from,
    read_task_records,
)
from mamo.data.transforms import augmenting, eval_transform

Record = TypeVar("Record", bound=TaskRecord)
LoadImage = Callable[[str], Tensor]
"""An image's name in a record -> uint8 [3, ?, ?]; raises BadSample naming it."""


@dataclass(frozen=True, slots=True)
class TaskSample(Generic[Record]):
    """`images` uint8 [I, 3, H, W]; `sample_id` is the record's index; `skipped` as `Sample` has it."""

    record: Record
    images: Tensor
    sample_id: int
    skipped: tuple[str, ...]


class TaskSource(Generic[Record]):
    """Records with their images; a sample is a pure function of (index, generator)."""

    group_size = 1

    def __init__(self, records: Sequence[Record], load_image: LoadImage, data: DataConfig) -> None:
        self.records = records
        self.load_image = load_image
        self.image_size_px = data.image_size
        self.on_bad = data.bad_samples.policy
        self.transform = augmenting(data) if data.source != "scenes" else eval_transform
        self.folder = Path(data.train_files[0]).parent.absolute() if data.source != "scenes" else None

    def __len__(self) -> int:
        return len(self.records)

    def identity(self) -> Iterator[str]:
        """The records."""
        for record in self.placed_records():
            yield record.model_dump_json() + "\n"

    def placed_records(self) -> Iterator[Record]:
        """The records, their images named from the first file's folder: the same data at another place are the same."""
        for record in self.records:
            if self.folder is None:
                yield record
            else:
                yield with_images(record, [name_from(self.folder, name) for name in image_names(record)])

    def data_sets(self) -> list[str]:
        """The embedded world, or files of records."""
        return ["scenes"] if isinstance(self.load_image, _SceneImages) else ["records"]

    def load(self, index: int, rng: np.random.Generator) -> TaskSample[Record]:
        """Loads record `index`; `rng` drives the augmentation. Raises BadSample as `PairDataset.load`."""
        return first_good(index, len(self), self.on_bad, lambda at, skipped: self._load_one(at, rng, skipped))

    def _load_one(self, index: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> TaskSample[Record]:
        record = self.records[index]
        try:
            loaded = [self.load_image(name) for name in image_names(record)]
        except BadSample as error:
            raise BadSample(f"{record.key} {getattr(record, record.key)}: {error}") from error
        images = torch.stack([self.transform(image, self.image_size_px, rng) for image in loaded])
        return TaskSample(record, images, index, skipped)


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


def records_of(data: DataConfig, kind: type[Record], split: Split, n_items: int) -> tuple[list[Record], LoadImage]:
    """The training (`split` "train") or evaluation records of a config.

    Args:
        data: the config's.
        kind: of record.
        split: of scenes; of files, "train" means `train_file` and anything else `eval_file`.
        n_items: how many of scenes; files are taken whole.
    """
    if data.source == "scenes":
        world = SceneWorld(data.difficulty, WORLD_SEED)
        return scene_records(world, kind, split, n_items, data.image_size), _SceneImages(world, split, data.image_size)
    files = data.train_files if split == "train" else [str(data.eval_file)]
    return file_records(files, kind)


def check_records(data: DataConfig, kind: type[Record]) -> None:
    """Read the evaluation records where they are a file's; raises as `read_task_records`."""
    if data.source != "scenes":
        records_of(data, kind, "test", 0)


@dataclass(frozen=True, slots=True)
class _SceneImages:
    """Draws the scene of a record."""

    world: SceneWorld
    split: Split
    size: tuple[int, int]

    def __call__(self, name: str) -> Tensor:
        picture = render(self.world.scene(self.split, int(name)), self.size)
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def scene_records(
    world: SceneWorld, kind: type[Record], split: Split, n_items: int, image_size_px: tuple[int, int]
) -> list[Record]:
    """The first `n_items` questions, statements or expressions about the scenes of `split`, as records of `kind`."""
    rows: list[dict[str, Any]] = []
    if kind is VqaRecord:
        for index in range(n_items):
            asked = question(world, split, index)
            types = {"answer_type": asked.answer_type, "question_type": asked.kind}
            rows.append({"image": str(index), "question_id": index, "question": asked.text, **types})
            rows[-1]["answers"] = list(asked.answers)
    elif kind is ReasoningRecord:
        for item in pair_statements(world, split, n_items):
            images = [str(item.left), str(item.right)]
            rows.append({"images": images, "sentence": item.sentence, "label": item.label})
            rows[-1]["identifier"] = item.identifier
    else:
        assert kind is GroundingRecord
        for number, phrase in enumerate(expressions(world, n_items, image_size_px, split)):
            boxes = {"box_xywh": phrase.box, "proposals_xywh": list(phrase.proposals)}
            named = {
                "image": str(phrase.scene_index),
                "expression_id": number,
                "expression": phrase.text,
                "foil": phrase.foil,
            }
            rows.append({**named, **boxes})
    return [kind.model_validate(row) for row in rows]


def load_distinct(
    records: Sequence[Record], load_image: LoadImage, image_size_px: tuple[int, int] | None
) -> tuple[list[Tensor], dict[str, int]]:
    """Each image of some records once, for evaluation: uint8 [3, H, W] (of its own size without `image_size_px`), and
    where each is, by name. Raises BadSample, naming the record, for one that cannot be read.
    """
    images: list[Tensor] = []
    place: dict[str, int] = {}
    for record in records:
        for name in image_names(record):
            if name in place:
                continue
            try:
                image = load_image(name)
            except BadSample as error:
                raise BadSample(f"{record.key} {getattr(record, record.key)}: {error}") from error
            place[name] = len(images)
            images.append(image if image_size_px is None else eval_transform(image, image_size_px))
    return images, place
