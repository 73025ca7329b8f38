"""Judgements of evaluation files, the same before training, in the evaluation, and in `mamo data`.

Rows are judged whole. Of pictures the headers are read, which takes a hundredth of the time of decoding them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mamo.data.images import BadSampleError, BadSamplePolicy, read_size
from mamo.data.items import ItemFile, box_problem
from mamo.data.records import GroundingRecord, ReasoningRecord, boxes_outside, whole_pixels
from mamo.data.shard_index import ShardMember, read_member

_LISTED = 3


def row_problems(records: Sequence[Any]) -> list[str]:
    """Return what an evaluation cannot score, whatever the pictures: one line a record."""
    problems = []
    for record in records:
        if isinstance(record, ReasoningRecord):
            if len(record.images) != len(records[0].images):
                problems.append(
                    f"identifier {record.identifier} has {len(record.images)} image(s), others "
                    f"{len(records[0].images)}; keep statements about one image and about pairs in separate files"
                )
            try:
                sentence_of(record.identifier)
            except ValueError as error:
                problems.append(str(error))
        elif isinstance(record, GroundingRecord) and record.box_xywh is None:
            problems.append(f"{name_of(record)}: has no box_xywh, the truth to score by")
    return problems


def grounding_problems(record: GroundingRecord, width: int, height: int) -> list[str]:
    """Return a line for each box that is not inside its image of this size, or covers no pixel of it."""
    found = boxes_outside(record, width, height)
    if not found:
        found = [
            f"{name_of(record)}: proposal {index} {box} covers no pixel of {width} x {height}"
            for index, box in enumerate(record.proposals_xywh)
            if whole_pixels(box, width, height) is None
        ]
    return found


def item_box_problems(file: ItemFile) -> list[str]:
    """Return "FILE:LINE: ..." for each box of an item that is not inside its image, by the headers of the images.

    Images that cannot be opened are left out.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    problems = []
    for item, line in zip(file.items, file.lines, strict=True):
        for index, box in item.boxes.items():
            name = item.images[index]
            if name not in sizes:
                try:
                    sizes[name] = read_size(Path(name))
                except BadSampleError:
                    sizes[name] = None
            size = sizes[name]
            problem = "" if size is None else box_problem(box, *size)
            if problem:
                problems.append(f"{file.path}:{line}: {problem}")
    return problems


def sentence_of(identifier: str) -> str:
    """Return the part of an identifier that a sentence's statements share. Raises ValueError for an unknown form."""
    parts = identifier.split("-")
    if len(parts) == 4 and not parts[0].isdigit():
        split, image_set, _, sentence = parts
        return f"{split}-{image_set}-{sentence}"
    if len(parts) in (2, 3) and all(part.isdigit() for part in parts):
        return parts[0]
    raise ValueError(f"NLVR: identifier {identifier!r} is neither split-set-pair-sentence nor n-m or n-m-k")


def name_of(record: Any) -> str:
    """Return a record's key and, of grounding, its image, for messages."""
    shown = f" ({record.image})" if isinstance(record, GroundingRecord) else ""
    return f"{record.key} {getattr(record, record.key)}{shown}"


def raise_problems(source: object, problems: Sequence[str]) -> None:
    """Raise ValueError with the first problems of a file and the number of all, if there are any."""
    if problems:
        more = "; ..." if len(problems) > _LISTED else ""
        raise ValueError(f"{source}: {len(problems)} problem(s): {'; '.join(problems[:_LISTED])}{more}")


def check_headers(
    named: Iterable[tuple[str, str | ShardMember]], policy: BadSamplePolicy
) -> dict[str | ShardMember, tuple[int, int]]:
    """Read the header of each distinct picture.

    Args:
        named: (what to call it in a message, picture).
        policy: counts those that cannot be opened, and decides.

    Returns:
        Width and height of the pictures that can be opened.

    Raises:
        BadSampleError: as `policy` says.
    """
    sizes: dict[str | ShardMember, tuple[int, int]] = {}
    failed: set[str | ShardMember] = set()
    for name, image in named:
        if image in sizes or image in failed:
            continue
        try:
            sizes[image] = size_of(image)
        except BadSampleError as error:
            failed.add(image)
            policy.record(0, [f"{name}: {error}" if name else str(error)])
        else:
            policy.record(1, [])
    return sizes


def size_of(image: str | ShardMember) -> tuple[int, int]:
    """Return (width, height) of a picture, a path or a member of a tar; see `read_size`."""
    if isinstance(image, str):
        return read_size(Path(image))
    try:
        return read_size(read_member(image), name=str(image))
    except OSError as error:
        raise BadSampleError(f"{image}: {error}") from None
