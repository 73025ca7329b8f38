"""Readers of image-caption pairs in four layouts. Error messages contain file, line and field.

Our own layout is JSON Lines (UTF-8), one object a line:

    {"image": "images/1.jpg", "caption": ["a red kite", "someone flies a kite"], "image_id": "kite-1"}

| key | value |
|---|---|
| `image` | path, relative to the folder of the file, or absolute |
| `caption` | one string or a list of strings |
| `image_id` | optional string or integer, the same for rows with the same image (default: the image's path) |
| `directory` | optional string: a group that folds must not split |

The other layouts are ALBEF's caption JSON (a list of the same objects), Karpathy's split JSON (`{"images": [...]}`),
and tar shards in img2dataset's layout (`KEY.jpg` with `KEY.txt` or `KEY.json`).
"""

import difflib
import glob
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.config.values import Values
from mamo.data.errors import ErrorCollector
from mamo.data.pair_record import PairRecord
from mamo.data.shards import read_shards

MAX_CAPTION_CHARS = 1000  # longer than the input of any text encoder; bounds the tokenizer's work on long texts
_ROW_KEYS = ("image", "caption", "image_id", "directory")


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
    """Write one JSON object a line (UTF-8). Creates the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


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
    lines = _read_text(path, hint).split("\n")
    return lines if lines[-1] else lines[:-1]


def _read_text(path: Path, hint: str = "") -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}{hint}") from None


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
    if is_shards and split is not None:
        raise ValueError(_split_unused(path, split))
    records: Sequence[PairRecord] = read_shards(path) if is_shards else _read_json(path, split)
    if not records:
        raise ValueError(f"{path}: contains no image-caption pairs")
    return records


def _read_json(path: Path, split: str | None) -> list[PairRecord]:
    text = _read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; write one JSON object a line")
    document = _whole_document(path, text)
    if isinstance(document, dict):
        return _read_karpathy(path, document, split)
    if split is not None:
        raise ValueError(_split_unused(path, split))
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
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if start[0] == "{":
            return None  # JSON Lines with a damaged first row; `_read_lines` reports the line
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); the file may be cut short") from None
    return document if isinstance(document, list) or "images" in document else None


def _parse(text: str) -> Any:
    """Parse JSON; None if it is not valid."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _read_lines(path: Path, text: str) -> list[PairRecord]:
    errors, rows = ErrorCollector(path), []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                errors.add(number, f"not valid JSON ({error.msg}, column {error.colno}); write one object a line")
    return _read_rows(path, rows, errors)


def _read_rows(path: Path, rows: list[tuple[int, Any]], errors: ErrorCollector | None = None) -> list[PairRecord]:
    errors = errors or ErrorCollector(path)
    folder = path.parent.absolute()
    records = []
    for line, row in rows:
        row_errors = _row_errors(row)
        if row_errors:
            errors.add(line, ", ".join(row_errors))
            continue
        image = str(folder / row["image"])
        captions = (row["caption"],) if isinstance(row["caption"], str) else tuple(row["caption"])
        image_id = str(row.get("image_id", image))
        records.append(PairRecord(image, captions, image_id, line, str(path), row.get("directory")))
    errors.raise_if_any()
    return records


def _row_errors(row: Any) -> list[str]:
    """Return the errors of one row, empty if it is valid."""
    if not isinstance(row, dict):
        return [f"must be a JSON object with 'image' and 'caption', got {type(row).__name__}"]
    errors = []
    unknown = sorted(row.keys() - set(_ROW_KEYS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], _ROW_KEYS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known fields: {', '.join(_ROW_KEYS)}"
        errors.append(f"unknown field {', '.join(map(repr, unknown))} ({hint})")
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "image": (lambda value: isinstance(value, str) and bool(value.strip()), "a path"),
        "caption": (_is_caption, "a string or a non-empty list of strings"),
        "image_id": (
            lambda value: isinstance(value, str | int) and not isinstance(value, bool),
            "a string or an integer",
        ),
        "directory": (lambda value: isinstance(value, str), "a string"),
    }
    for key, (is_good, wanted) in checks.items():
        if key not in row:
            if key in ("image", "caption"):
                errors.append(f"field '{key}' is missing; add {wanted}")
        elif not is_good(row[key]):
            errors.append(f"field '{key}' must be {wanted}, got {json.dumps(row[key])[:60]}")
    return errors


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _read_karpathy(path: Path, document: Values, split: str | None) -> list[PairRecord]:
    images = document["images"]
    if not isinstance(images, list):
        raise ValueError(f"{path}: field 'images' must be a list of images, got {type(images).__name__}")
    known = sorted({str(image.get("split")) for image in images if isinstance(image, dict)})
    wanted = {"train", "restval"} if split == "train" else {split}
    if not wanted & set(known):
        raise ValueError(f"{path}: a Karpathy file needs a split out of {', '.join(known)}; got {split}")
    errors, rows = ErrorCollector(path), []
    for number, image in enumerate(images, 1):
        try:
            if image["split"] not in wanted:
                continue
            captions = [sentence["raw"] for sentence in image["sentences"]]
            name = str(Path(image.get("filepath", "")) / image["filename"])
            identifier = f"{document.get('dataset', path.stem)}_{image.get('cocoid', image.get('imgid', name))}"
        except (KeyError, TypeError, AttributeError) as error:
            errors.add(
                number, f"an image needs 'filename', 'split' and 'sentences' with 'raw'; {error} is missing or wrong"
            )
            continue
        rows.append((number, {"image": name, "caption": captions, "image_id": identifier}))
    return _read_rows(path, rows, errors)
