"""Readers of image-caption pairs: four layouts, one record type, every mistake named with its file, line and field.

Our own layout is JSON Lines (UTF-8), one object a line:

    {"image": "images/1.jpg", "caption": ["a red kite", "someone flies a kite"], "image_id": "kite-1"}

| key | value |
|---|---|
| `image` | path, relative to the folder of the file, or absolute |
| `caption` | one string or a list of strings |
| `image_id` | optional string or integer: rows with the same one show the same picture (default: the image's path) |
| `directory` | optional string: a group that folds must not split |

The others: ALBEF's caption JSON (a list of the same objects), Karpathy's split JSON (`{"images": [...]}`), and tar
shards in img2dataset's layout (`KEY.jpg` beside `KEY.txt` or `KEY.json`).
"""

import difflib
import glob
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.data.pair_record import ErrorCollector, PairRecord
from mamo.data.shards import read_shards

MAX_CAPTION_CHARS = (
    1000  # far more than any text encoder's window; bounds the tokenizer's work on a 10,000-word caption
)
_ROW_KEYS = ("image", "caption", "image_id", "directory")


def clean_caption(text: str) -> str:
    """NFKC-normalised, spaces collapsed, at most MAX_CAPTION_CHARS characters; lone surrogates become '?'.

    Empty where the text has nothing to print (only spaces, control or zero-width characters), or accents and other
    marks alone: of these the tokenizer leaves nothing that means something.
    """
    text = text[: 4 * MAX_CAPTION_CHARS].encode("utf-8", "replace").decode("utf-8")
    text = " ".join(unicodedata.normalize("NFKC", text).split())[:MAX_CAPTION_CHARS].strip()
    return text if any(map(_is_seen, text)) else ""


def _is_seen(char: str) -> bool:
    return char.isprintable() and not char.isspace() and not unicodedata.category(char).startswith("M")


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, UTF-8; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def lines_of(path: Path, hint: str = "") -> list[str]:
    """The lines of a UTF-8 file, without the empty one after its last line end.

    A line feed alone ends a line: `str.splitlines` would also cut at U+2028 and its like, which JSON strings hold raw.

    Raises ValueError naming the file where it cannot be read (`hint` says what then to do) or is not UTF-8.
    """
    lines = _decoded(path, hint).split("\n")
    return lines if lines[-1] else lines[:-1]


def _decoded(path: Path, hint: str = "") -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}{hint}") from None


def read_pairs(path: Path, split: str | None = None) -> Sequence[PairRecord]:
    """Reads all pairs of a file, a folder of tar shards, or a glob of them; the layout is told by the content.

    `split` is for Karpathy files, which hold all of them ("train" takes train and restval), and needed there.

    Of tar shards each pair is read when it is asked for (`shard_pairs.ShardPairs`).

    Raises ValueError with every bad row (the first ten and the count): file, line, field and fix.
    """
    is_shards = path.is_dir() or path.suffix == ".tar" or (glob.has_magic(str(path)) and not path.exists())
    if is_shards and split is not None:
        raise ValueError(_split_unused(path, split))
    records: Sequence[PairRecord] = read_shards(path) if is_shards else _read_text(path, split)
    if not records:
        raise ValueError(f"{path}: holds no image-caption pair")
    return records


def _read_text(path: Path, split: str | None) -> list[PairRecord]:
    text = _decoded(path)
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
    return f"{path}: split {split!r} was given, but only Karpathy files hold splits; leave it out"


def _whole_document(path: Path, text: str) -> Any:
    """The parsed file if it is one JSON list (ALBEF) or one object with "images" (Karpathy); None for JSON Lines."""
    start = text.lstrip()
    first_line = _parse(start.split("\n", 1)[0])
    is_row = isinstance(first_line, dict) and "images" not in first_line
    if is_row or start[0] not in "[{":
        return None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if start[0] == "{":
            return None  # JSON Lines with a damaged first row; its reader names the line
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); the file may be cut short") from None
    return document if isinstance(document, list) or "images" in document else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _read_lines(path: Path, text: str) -> list[PairRecord]:
    problems, rows = ErrorCollector(path), []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                problems.add(number, f"not valid JSON ({error.msg}, column {error.colno}); write one object a line")
    return _read_rows(path, rows, problems)


def _read_rows(path: Path, rows: list[tuple[int, Any]], problems: ErrorCollector | None = None) -> list[PairRecord]:
    problems = problems or ErrorCollector(path)
    folder = path.parent.absolute()
    records = []
    for line, row in rows:
        mistakes = _row_mistakes(row)
        if mistakes:
            problems.add(line, ", ".join(mistakes))
            continue
        image = str(folder / row["image"])
        captions = (row["caption"],) if isinstance(row["caption"], str) else tuple(row["caption"])
        image_id = str(row.get("image_id", image))
        records.append(PairRecord(image, captions, image_id, line, str(path), row.get("directory")))
    problems.raise_if_any()
    return records


def _row_mistakes(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"must be a JSON object with 'image' and 'caption', got {type(row).__name__}"]
    mistakes = []
    unknown = sorted(row.keys() - set(_ROW_KEYS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], _ROW_KEYS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(_ROW_KEYS)}"
        mistakes.append(f"unknown field {', '.join(map(repr, unknown))} ({hint})")
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
                mistakes.append(f"field '{key}' is missing; add {wanted}")
        elif not is_good(row[key]):
            mistakes.append(f"field '{key}' must be {wanted}, got {json.dumps(row[key])[:60]}")
    return mistakes


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _read_karpathy(path: Path, document: dict[str, Any], split: str | None) -> list[PairRecord]:
    images = document["images"]
    if not isinstance(images, list):
        raise ValueError(f"{path}: field 'images' must be a list of images, got {type(images).__name__}")
    known = sorted({str(image.get("split")) for image in images if isinstance(image, dict)})
    wanted = {"train", "restval"} if split == "train" else {split}
    if not wanted & set(known):
        raise ValueError(f"{path}: a Karpathy file needs a split out of {', '.join(known)}; got {split}")
    problems, rows = ErrorCollector(path), []
    for number, image in enumerate(images, 1):
        try:
            if image["split"] not in wanted:
                continue
            captions = [sentence["raw"] for sentence in image["sentences"]]
            name = str(Path(image.get("filepath", "")) / image["filename"])
            identifier = f"{document.get('dataset', path.stem)}_{image.get('cocoid', image.get('imgid', name))}"
        except (KeyError, TypeError, AttributeError) as error:
            problems.add(
                number, f"an image needs 'filename', 'split' and 'sentences' with 'raw'; {error} is wrong here"
            )
            continue
        rows.append((number, {"image": name, "caption": captions, "image_id": identifier}))
    return _read_rows(path, rows, problems)
