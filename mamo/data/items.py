"""Items of fine-grained benchmarks: JSON Lines, one comparison of one or two images with one to five texts a line.

    {"images": ["a.jpg"], "texts": ["a red kite", "a blue kite"], "right": [[0, 0]], "group": "colour", "id": "1",
     "boxes": {"0": [x, y, width, height]}, "set": {"pair": "kites"}}

`right` lists the (image, text) pairs that match. It may be empty where one text is judged of one image. `boxes` crops
an image before it is resized. `set` names, by kind, the sets whose items count together; a text is short for
`{"set": TEXT}`. Images that several rows name are encoded once.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, Strict, ValidationError

from mamo.data.errors import ErrorCollector, UnknownFields, json_rows
from mamo.data.files import brief, brief_names
from mamo.data.formats import name_table
from mamo.data.pairs_reader import read_lines
from mamo.data.records import Box, TaskRecord, Words, describe_errors, field_descriptions, image_path, whole_pixels

ROUNDING_PX = 1.0
"""A box may exceed its image by less than this."""
_Indices = Annotated[tuple[Annotated[int, Strict()], Annotated[int, Strict()]], Strict(False)]


class Item(TaskRecord):
    """One or two images, one to five texts, and the (image, text) pairs that match."""

    key: ClassVar[str] = "id"
    images: Annotated[list[Words], Field(min_length=1, max_length=2)] = Field(
        description="a list of one or two paths relative to this file"
    )
    texts: Annotated[list[Words], Field(min_length=1, max_length=5)] = Field(
        description="a list of one to five texts that are not blank"
    )
    right: list[_Indices] = Field(description="a list of [index of an image, index of a text]")
    group: Words = Field(description="a text that is not blank, by which accuracy is split")
    id: Words = Field(description="a text that no other item has")
    boxes: dict[int, Box] = Field(
        default={},
        description='an object of boxes [x, y, width, height] in pixels by the index of the image, "0" or "1"',
    )
    set: dict[str, Words] = Field(default={}, description="a text, or an object of texts by the kind of set")

    @property
    def is_statement(self) -> bool:
        """Return whether one text is judged true or false of one image."""
        return len(self.images) == len(self.texts) == 1

    def crop(self, image: int) -> tuple[str, Box | None]:
        """Return the path and the box of an image; two items with the same show the network the same pixels."""
        return self.images[image], self.boxes.get(image)


@dataclass(frozen=True, slots=True)
class ItemFile:
    """The items of a file, with absolute image paths.

    `lines` has the 1-based line of each item, `sha256` is the hexadecimal digest of the file, and `n_equal_texts`
    counts the items two of whose texts are equal.
    """

    path: Path
    items: list[Item]
    lines: list[int]
    sha256: str
    n_equal_texts: int = 0


def read_items(path: Path, is_official: bool = False, hint: str = "") -> ItemFile:
    """Read a file of items.

    Args:
        path: JSON Lines.
        is_official: whether it is of a published set, whose items with equal texts are kept and counted.
        hint: appended to the message if the file cannot be read.

    Raises:
        ValueError: bad rows (the first ten kinds of errors, each with file, line, field and reason), a repeated id, or
            a file that cannot be read or is empty.
    """
    errors = ErrorCollector(path)
    lines = read_lines(path, hint)
    table = name_table(path, "\n".join(lines[:20]))
    if table:
        raise ValueError(f"{path}: {table}")
    fields = UnknownFields(field_descriptions(Item), [k for k, f in Item.model_fields.items() if f.is_required()])
    found: dict[str, Item] = {}
    line_of: dict[str, int] = {}
    n_equal = 0
    for number, row in json_rows(lines, errors):
        item = _item_or_errors(row, fields)
        texts = [] if isinstance(item, list) else equal_texts(item)
        if isinstance(item, list) or (texts and not is_official):
            for text in item if isinstance(item, list) else texts:
                errors.add(number, text)
            continue
        if item.id in found:
            errors.add(number, f"id {brief(item.id)} occurs twice, first in line {line_of[item.id]}")
            continue
        n_equal += bool(texts)
        names = [str(image_path(path, name)) for name in item.images]
        found[item.id], line_of[item.id] = item.model_copy(update={"images": names}), number
    errors.raise_if_any()
    if not found:
        raise ValueError(f"{path}: contains no items")
    return ItemFile(path, list(found.values()), list(line_of.values()), sha256_of(path), n_equal)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _item_or_errors(row: object, fields: UnknownFields) -> Item | list[str]:
    if not isinstance(row, dict):
        return [f"must be a JSON object with fields {', '.join(fields.known)}, got {brief(row)}"]
    unknown = [name for name in row if name not in fields.known]
    errors = fields.check(row)
    if unknown and not errors:
        known = ", ".join(fields.known)
        errors.append(f"unknown field {brief_names(unknown)}; rename or remove it; known fields: {known}")
    values = {name: value for name, value in row.items() if name in fields.known}
    try:
        item = Item.model_validate(_plain(values))
    except ValidationError as error:
        return [*errors, *describe_errors(error, Item, values)]
    return errors or index_problems(item) or item


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row with indices as keys of `boxes`, and `set` by kind."""
    found = dict(values)
    boxes = found.get("boxes")
    if isinstance(boxes, dict):
        found["boxes"] = {int(key) if key in ("0", "1") else key: box for key, box in boxes.items()}
    if isinstance(found.get("set"), str):
        found["set"] = {"set": found["set"]}
    return found


def index_problems(item: Item) -> list[str]:
    """Return a message for each index out of range, repeated image, and for an item that compares nothing."""
    n_images, n_texts = len(item.images), len(item.texts)
    has = f"the item has {n_images} image(s) and {n_texts} text(s), counted from 0"
    problems = [
        f"field 'right': [{image}, {text}] names an image or text that does not exist; {has}"
        for image, text in item.right
        if not (0 <= image < n_images and 0 <= text < n_texts)
    ]
    problems += [f"field 'boxes': image {index} does not exist; {has}" for index in item.boxes if index >= n_images]
    if not problems and n_images == 2 and item.crop(0) == item.crop(1):
        problems.append("field 'images': both are the same image; the item needs two different ones")
    if not problems and not item.is_statement and not (right_and_wrong(item, 0) or right_and_wrong(item, 1)):
        problems.append(
            "field 'right': nothing is compared; one image needs a right and a wrong text, or one text a right and a "
            "wrong image"
        )
    return problems


Pair = tuple[int, int]
"""Index of an image and of a text."""


def right_and_wrong(item: Item, axis: int) -> list[tuple[list[Pair], list[Pair]]]:
    """Return the (right pairs, wrong pairs) that are compared for each image (`axis` 0) or each text (1).

    An image without a right or without a wrong text compares nothing and is left out; so is such a text.
    """
    return _comparisons(len(item.images), len(item.texts), tuple(item.right), axis)


@functools.cache
def _comparisons(
    n_images: int, n_texts: int, right: tuple[Pair, ...], axis: int
) -> list[tuple[list[Pair], list[Pair]]]:
    """Return `right_and_wrong`, computed once for all items of one shape."""
    found = []
    for own in range((n_images, n_texts)[axis]):
        pairs = [(own, other) if axis == 0 else (other, own) for other in range((n_texts, n_images)[axis])]
        sides = [pair for pair in pairs if pair in right], [pair for pair in pairs if pair not in right]
        if all(sides):
            found.append(sides)
    return found


def equal_texts(item: Item) -> list[str]:
    """Return a message for each text of an item that equals an earlier one, letter by letter."""
    return [
        f"field 'texts': texts {item.texts.index(text)} and {index} are equal, {brief(text)}; change or remove one"
        for index, text in enumerate(item.texts)
        if item.texts.index(text) < index
    ]


def as_row(item: Item) -> dict[str, Any]:
    """Return an item as a row of a file, without what it does not have."""
    row = item.model_dump(exclude_defaults=True)
    if item.boxes:
        row["boxes"] = {str(index): list(box) for index, box in item.boxes.items()}
    return row


def box_problem(box: Box, width: int, height: int) -> str:
    """Return what is wrong with a box in an image of this size in pixels; "" for nothing."""
    x, y, w, h = box
    if min(x, y) < -ROUNDING_PX or x + w > width + ROUNDING_PX or y + h > height + ROUNDING_PX:
        return (
            f"field 'boxes': {list(box)} is not inside its image of {width} x {height} px; use [x, y, width, height] "
            "in pixels of the image"
        )
    if whole_pixels(box, width, height) is None:
        return f"field 'boxes': {list(box)} covers no pixel of its image of {width} x {height} px; enlarge it"
    return ""
