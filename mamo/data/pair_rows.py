"""Rows of image-caption pairs: the fields of a row, its errors, and the record that it makes.

Error messages contain file, line and field.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamo.config.values import Values
from mamo.data.captions import CAPTION, CaptionKeys, texts_of, weighted_captions
from mamo.data.errors import ErrorCollector, UnknownFields
from mamo.data.files import brief, brief_names
from mamo.data.pair_record import PairRecord

_FIELDS = {
    "image": "a path",
    "caption": "a string or a non-empty list of strings",
    "image_id": "a string or an integer",
    "directory": "a string",
    "foils": "a string or a non-empty list of strings",
    "caption_id": "a string or an integer, or a list of them, one for each caption",
}
"""Description of the values of each field."""
OTHER_NAMES = {"file_name": "image", "filepath": "image", "text": CAPTION, "title": CAPTION}
"""Fields of Hugging Face's image folders and of open_clip's tables -> ours, which a row must lack."""


class RowReader:
    """Checks the rows of one file and makes records of them.

    `errors` collects the errors of rows, `fields` the fields that are not read; `absent` are the caption keys that no
    row had yet.
    """

    def __init__(self, path: Path, keys: CaptionKeys, errors: ErrorCollector | None = None) -> None:
        self.path, self.keys = path, keys
        self.errors = errors or ErrorCollector(path)
        self.folder = path.parent.absolute()
        self.prefix = os.path.join(self.folder, "")
        names = ["image", *keys, "image_id", "directory", "foils", "caption_id"]
        known = {name: _FIELDS.get(name, _FIELDS[CAPTION]) for name in names}
        self.fields = UnknownFields(known, ("image", *(keys if len(keys) == 1 else ())))
        self.absent = {key for key, weight in keys.items() if weight}

    def read(self, line: int, value: Any) -> PairRecord | None:
        """Return the record of a row; None for a bad row, whose errors are collected."""
        row = self.named(value) if isinstance(value, dict) else value
        found = _row_errors(row, self.fields, self.keys)
        if found:
            self.errors.add(line, ", ".join(found))
            return None
        self.absent -= row.keys()
        return self.record(line, row)

    def record(self, line: int, row: Values) -> PairRecord:
        """Return the record of a row that has no errors and our names of the fields."""
        name = row["image"]
        if is_plain_path(name):
            image = name if name[0] == os.sep else self.prefix + name
        else:
            image = str(self.folder / (os.path.expanduser(name) if name.startswith("~/") else name))
        texts = {key: texts_of(row.get(key)) or [] for key in self.keys}
        captions, weights = weighted_captions(texts, self.keys)
        if len(self.keys) == 1:  # blank ones too: the bad-sample policy decides
            captions = tuple(*texts.values())
        foils = tuple(texts_of(row.get("foils")) or ())
        image_id = str(row.get("image_id", image))
        own = row.get("caption_id", ()) if set(self.keys) == {CAPTION} else ()
        ids = tuple(map(str, own if isinstance(own, list | tuple) else [own]))
        place = (line, str(self.path), row.get("directory"))
        return PairRecord(image, captions or ("",), image_id, *place, foils, ids, weights)

    def named(self, row: Values) -> Values:
        """Return a row with the fields of `OTHER_NAMES` under our names where it lacks them; the first of several.

        A field that is a caption key keeps its name.
        """
        renamed: dict[str, str] = {}
        for other, own in OTHER_NAMES.items():
            is_wanted = own == "image" or own in self.keys
            if other in row and own not in row and is_wanted and other not in self.keys and own not in renamed.values():
                renamed[other] = own
        return {renamed.get(name, name): value for name, value in row.items()} if renamed else row

    def finish(self, n_records: int) -> None:
        """Log the fields that are not read.

        Raises:
            ValueError: rows have errors, or a caption key that no row has.
        """
        self.errors.raise_if_any()
        self.fields.log(self.path)
        if self.absent and n_records:
            key = sorted(self.absent)[0]
            raise ValueError(f"{self.path}: no row has the caption key {key!r}; correct data.caption_keys")


def is_plain_path(name: str) -> bool:
    """Return whether `pathlib` would leave a path as it is, so that the folder can be put in front of its text."""
    return not ("./" in name or "//" in name or name[-1] in "/." or name[0] == "~")


def _row_errors(row: Any, fields: UnknownFields, keys: CaptionKeys) -> list[str]:
    """Return the errors of one row, empty if it is valid."""
    if not isinstance(row, dict):
        return [f"must be a JSON object with 'image' and 'caption', got {brief(row)}"]
    errors = fields.check(row)
    if len(keys) > 1 and all(row.get(key) is None for key in keys):
        errors.append(f"none of the caption keys {', '.join(keys)}; the row has {brief_names(list(row))}")
    checks: dict[str, Callable[[Any], bool]] = {
        "image": lambda value: isinstance(value, str) and bool(value.strip()),
        "image_id": is_id,
        "directory": lambda value: isinstance(value, str),
        "foils": _is_caption,
        "caption_id": lambda value: _are_ids(value, row.get("caption")),
        **dict.fromkeys(keys, _is_caption if len(keys) == 1 else lambda value: texts_of(value) is not None),
    }
    for key, is_good in checks.items():
        if key in row and not is_good(row[key]):
            errors.append(f"field '{key}' must be {fields.known[key]}, got {brief(row[key])}")
    if not errors and "foils" in row:
        captions = [text for name in keys for text in texts_of(row.get(name)) or []]
        foils = texts_of(row["foils"]) or []
        errors += [f"field 'foils' has a caption of the row, {brief(foil)}" for foil in foils if foil in captions][:1]
    return errors


def is_id(value: object) -> bool:
    """Return whether a JSON value is a string or an integer."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def _are_ids(value: Any, captions: Any) -> bool:
    if isinstance(captions, str):
        return is_id(value) or (isinstance(value, list) and len(value) == 1 and is_id(value[0]))
    has_all = isinstance(value, list) and isinstance(captions, list) and len(value) == len(captions)
    return has_all and all(map(is_id, value))


def _is_caption(value: Any) -> bool:
    return bool(texts_of(value))
