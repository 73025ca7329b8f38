"""Readers of image-caption pairs in four layouts. Error messages contain file, line and field.

Our own layout is JSON Lines (UTF-8), one object a line:

    {"image": "images/1.jpg", "caption": ["a red kite", "someone flies a kite"], "image_id": "kite-1"}

| key | value |
|---|---|
| `image` | path, relative to the folder of the file, or absolute |
| `caption` | one string or a list of strings |
| `image_id` | optional string or integer, the same for rows with the same image (default: the image's path) |
| `directory` | optional string: a group that folds must not split |
| `foils` | optional string or list of strings that are false of the image: hard negatives of ITM |
| `caption_id` | optional: a string or an integer for each caption, as `caption` one or a list; in files of rankings |

Other fields are ignored, with a line in the log. The other layouts are ALBEF's caption JSON (a list of the same
objects), Karpathy's split JSON (`{"images": [...]}`), COCO's captions JSON (`{"images": [...], "annotations": [...]}`),
and tar shards in img2dataset's layout (`KEY.jpg` with `KEY.txt` or `KEY.json`).
"""

import glob
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.config.values import Values
from mamo.data.errors import ErrorCollector, UnknownFields
from mamo.data.files import JsonError, brief, parse_json, read_text
from mamo.data.formats import name_folder, name_table
from mamo.data.pair_record import PairRecord
from mamo.data.shards import has_shards, read_shards

MAX_CAPTION_CHARS = 1000  # longer than the input of any text encoder; bounds the tokenizer's work on long texts
_FIELDS = {
    "image": "a path",
    "caption": "a string or a non-empty list of strings",
    "image_id": "a string or an integer",
    "directory": "a string",
    "foils": "a string or a non-empty list of strings",
    "caption_id": "a string or an integer, or a list of them, one for each caption",
}
"""Description of the values of each field."""
_REQUIRED = ("image", "caption")
_IMAGE_FOLDER = (
    "; this is a Hugging Face metadata.jsonl: rename its fields with "
    """sed 's/"file_name":/"image":/; s/"text":/"caption":/' metadata.jsonl > pairs.jsonl"""
)


_START_CHARS = 4096


def clean_caption(text: str) -> str:
    """Normalise a text (NFKC), collapse spaces and cut it to `MAX_CAPTION_CHARS`; lone surrogates become '?'.

    A text without a visible character returns "": it has only spaces, control or zero-width characters, or combining
    marks, from which the tokenizer makes no meaningful token.
    """
    text = text[: 4 * MAX_CAPTION_CHARS].encode("utf-8", "replace").decode("utf-8")
    text = " ".join(unicodedata.normalize("NFKC", text).split())[:MAX_CAPTION_CHARS].strip()
    return text if any(map(_is_visible, text)) else ""


def _is_visible(char: str) -> bool:
    return char.isprintable() and not char.isspace() and not unicodedata.category(char).startswith("M")


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line (UTF-8; lone surrogates are escaped). Creates the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as lines:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                line = json.dumps(row).encode("ascii")
            lines.write(line + b"\n")


def read_lines(path: Path, hint: str = "") -> list[str]:
    """Read the lines of a UTF-8 file, without the empty one after the last line feed.

    Only a line feed ends a line. `str.splitlines` would also split at U+2028 and similar characters, which are allowed
    in JSON strings.

    Args:
        path: the file.
        hint: appended to the message if the file cannot be read; says how to fix it.

    Raises:
        ValueError: the file cannot be read or is not UTF-8.
    """
    lines = read_text(path, hint).split("\n")
    return lines if lines[-1] else lines[:-1]


def read_pairs(path: Path, split: str | None = None) -> Sequence[PairRecord]:
    """Read the image-caption pairs of a file, a folder of tar shards, or a glob of shards.

    The layout is detected from the content. Pairs in shards are read on access, see `shards.TarShardDataset`.

    Args:
        path: a file, a folder or a glob.
        split: split of a Karpathy file, required there and not allowed elsewhere; "train" includes "restval".

    Raises:
        ValueError: bad rows (the first ten and the number of others, each with file, line, field and fix), no pairs,
            or a `split` that does not apply.
    """
    is_shards = path.is_dir() or path.suffix == ".tar" or (glob.has_magic(str(path)) and not path.exists())
    if is_shards and path.is_dir() and not has_shards(path):
        raise ValueError(f"{path}: no tar shard (*.tar) found; it is {name_folder(path)}")
    if is_shards and split is not None:
        raise ValueError(_split_unused(path, split))
    records: Sequence[PairRecord] = read_shards(path) if is_shards else _read_json(path, split)
    if not records:
        raise ValueError(f"{path}: contains no image-caption pairs")
    return records


def _read_json(path: Path, split: str | None) -> list[PairRecord]:
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; write one JSON object a line")
    table = name_table(path, text)
    if table:
        raise ValueError(f"{path}: {table}")
    document = _whole_document(path, text)
    if isinstance(document, dict) and "annotations" not in document:
        return _read_karpathy(path, document, split)
    if split is not None:
        raise ValueError(_split_unused(path, split))
    if isinstance(document, dict):
        return _read_coco(path, document)
    if isinstance(document, list):
        return _read_rows(path, list(enumerate(document, 1)))
    return _read_lines(path, text)


def _split_unused(path: Path, split: str) -> str:
    return f"{path}: split {split!r} does not apply, only Karpathy files have splits; remove it"


def _whole_document(path: Path, text: str) -> Any:
    """Parse a file that is one JSON list (ALBEF) or one object with "images" (Karpathy); None for JSON Lines."""
    start = text.lstrip()
    first_line = _parse(start.split("\n", 1)[0])
    is_row = isinstance(first_line, dict) and "images" not in first_line
    if is_row or start[0] not in "[{":
        return None
    try:
        document = parse_json(text)
    except JsonError as error:
        if start[0] == "{" and '"images"' not in start[:_START_CHARS]:
            return None  # JSON Lines with a damaged first row; `_read_lines` reports the line
        raise ValueError(f"{path}:{error.line}: {error.advise('the file may be cut short')}") from None
    return document if isinstance(document, list) or "images" in document else None


def _parse(text: str) -> Any:
    """Parse JSON; None if it is not valid."""
    try:
        return parse_json(text)
    except JsonError:
        return None


def _read_lines(path: Path, text: str) -> list[PairRecord]:
    errors, rows = ErrorCollector(path), []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, parse_json(line)))
            except JsonError as error:
                errors.add(number, error.advise("write one object a line"))
    return _read_rows(path, rows, errors)


def _read_rows(path: Path, rows: list[tuple[int, Any]], errors: ErrorCollector | None = None) -> list[PairRecord]:
    errors = errors or ErrorCollector(path)
    folder = path.parent.absolute()
    records = []
    fields = UnknownFields(_FIELDS, _REQUIRED)
    for line, row in rows:
        row_errors = _row_errors(row, fields)
        if row_errors:
            errors.add(line, ", ".join(row_errors))
            continue
        name = row["image"]
        image = str(folder / (os.path.expanduser(name) if name.startswith("~/") else name))
        captions, foils = (_as_tuple(row.get(key, ())) for key in ("caption", "foils"))
        image_id = str(row.get("image_id", image))
        own = row.get("caption_id", ())
        ids = tuple(map(str, own if isinstance(own, list | tuple) else [own]))
        directory = row.get("directory")
        records.append(PairRecord(image, captions, image_id, line, str(path), directory, foils, caption_ids=ids))
    errors.raise_if_any()
    fields.log(path)
    return records


def _row_errors(row: Any, fields: UnknownFields) -> list[str]:
    """Return the errors of one row, empty if it is valid."""
    if not isinstance(row, dict):
        return [f"must be a JSON object with 'image' and 'caption', got {brief(row)}"]
    errors = fields.check(row)
    if errors and "file_name" in row and "image" not in row:
        errors[-1] += _IMAGE_FOLDER
    checks: dict[str, Callable[[Any], bool]] = {
        "image": lambda value: isinstance(value, str) and bool(value.strip()),
        "caption": _is_caption,
        "image_id": lambda value: isinstance(value, str | int) and not isinstance(value, bool),
        "directory": lambda value: isinstance(value, str),
        "foils": _is_caption,
        "caption_id": lambda value: _are_ids(value, row.get("caption")),
    }
    for key, is_good in checks.items():
        if key in row and not is_good(row[key]):
            errors.append(f"field '{key}' must be {_FIELDS[key]}, got {brief(row[key])}")
    if not errors and "foils" in row:
        captions, foils = (_as_tuple(row[key]) for key in ("caption", "foils"))
        errors += [f"field 'foils' has a caption of the row, {brief(foil)}" for foil in foils if foil in captions][:1]
    return errors


def _as_tuple(texts: str | Sequence[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


def _are_ids(value: Any, captions: Any) -> bool:
    if isinstance(captions, str):
        return _is_id(value) or (isinstance(value, list) and len(value) == 1 and _is_id(value[0]))
    has_all = isinstance(value, list) and isinstance(captions, list) and len(value) == len(captions)
    return has_all and all(map(_is_id, value))


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _read_karpathy(path: Path, document: Values, split: str | None) -> list[PairRecord]:
    images = document["images"]
    if not isinstance(images, list):
        raise ValueError(f"{path}: field 'images' must be a list of images, got {brief(images)}")
    splits = {str(image["split"]) for image in images if isinstance(image, dict) and _is_text(image.get("split"))}
    if images and not splits:
        raise ValueError(f"{path}: its images have no 'split', so it is not a Karpathy file; write JSON Lines")
    wanted = {"train", "restval"} if split == "train" else {split}
    if not wanted & splits:
        raise ValueError(f"{path}: a Karpathy file needs a split out of {', '.join(sorted(splits))}; got {split}")
    errors, rows = ErrorCollector(path), []
    for number, image in enumerate(images, 1):
        wrong = _karpathy_error(image)
        if wrong:
            errors.add(number, f"an image needs 'filename', 'split' and 'sentences' with 'raw'; {wrong}")
        elif image["split"] in wanted:
            captions = [sentence["raw"] for sentence in image["sentences"]]
            name = str(Path(image.get("filepath", "")) / image["filename"])
            identifier = f"{document.get('dataset', path.stem)}_{image.get('cocoid', image.get('imgid', name))}"
            row = {"image": name, "caption": captions, "image_id": identifier}
            ids = [sentence.get("sentid") for sentence in image["sentences"]]
            rows.append((number, {**row, "caption_id": ids} if ids and all(map(_is_id, ids)) else row))
    return _read_rows(path, rows, errors)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _karpathy_error(image: Any) -> str:
    """Return what is missing or wrong in an entry of a Karpathy file, "" if nothing is."""
    if not isinstance(image, dict):
        return f"got {brief(image)}"
    for key in ("filename", "split"):
        if not _is_text(image.get(key)):
            return f"{key!r} is missing or no string"
    if not _is_text(image.get("filepath", "")):
        return "'filepath' is no string"
    sentences = image.get("sentences")
    if not isinstance(sentences, list):
        return "'sentences' is missing or no list"
    if not all(isinstance(sentence, dict) and _is_text(sentence.get("raw")) for sentence in sentences):
        return "'raw' of a sentence is missing or no string"
    return ""


def _read_coco(path: Path, document: Values) -> list[PairRecord]:
    """Read COCO's captions JSON: one record for each image with captions, in the order of `images`.

    Images are in the folder of the file, or, for `annotations/captions_NAME.json`, in `NAME/` next to `annotations/`.
    """
    errors = ErrorCollector(path)
    captions = _coco_captions(document["annotations"], errors)
    names: dict[object, str] = {}
    rows = []
    images = document["images"] if isinstance(document["images"], list) else [document["images"]]
    sibling = f"../{path.stem.removeprefix('captions_')}"
    for number, image in enumerate(images, 1):
        if not (isinstance(image, dict) and _is_id(image.get("id")) and _is_text(image.get("file_name"))):
            errors.add(number, "an entry of 'images' needs 'id' and 'file_name'; is it a captions file?")
            continue
        key, name = image["id"], image["file_name"]
        if key in names:
            errors.add(number, f"an entry of 'images': id {brief(key)} occurs twice")
        if not (path.parent / name).is_file() and (path.parent / sibling / name).is_file():
            name = f"{sibling}/{name}"
        names[key] = name
        is_coco = "coco_url" in image or image["file_name"].startswith("COCO_")
        if key in captions:
            identifier = f"coco/{key}" if is_coco else f"{path.stem}_{key}"
            row = {"image": name, "caption": [text for text, _ in captions[key]], "image_id": identifier}
            ids = [own for _, own in captions[key]]
            rows.append((number, {**row, "caption_id": ids} if all(map(_is_id, ids)) else row))
    unknown = [key for key in captions if key not in names]
    if unknown:
        errors.add(1, f"'annotations': image_id {brief(unknown[0])} is not in 'images'")
    return _read_rows(path, rows, errors)


def _coco_captions(annotations: Any, errors: ErrorCollector) -> dict[object, list[tuple[str, object]]]:
    """Return the captions of COCO's annotations, with their ids, by image id; bad entries are added to `errors`."""
    captions: dict[object, list[tuple[str, object]]] = {}
    for number, entry in enumerate(annotations if isinstance(annotations, list) else [annotations], 1):
        if isinstance(entry, dict) and _is_text(entry.get("caption")) and _is_id(entry.get("image_id")):
            captions.setdefault(entry["image_id"], []).append((entry["caption"], entry.get("id")))
        else:
            errors.add(number, "an entry of 'annotations' needs 'image_id' and 'caption'; is it a captions file?")
    return captions


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
