"""Readers of image-caption pairs in the layouts that people have. Error messages contain file, line and field.

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

Other fields are ignored, with a line in the log. `caption_keys` names other fields for the captions. The fields of
Hugging Face's `metadata.jsonl` and of open_clip's CSV are known by their names too (`OTHER_NAMES`). The other layouts
are a CSV or TSV of the same fields, ALBEF's caption JSON (a list of the same objects), Karpathy's split JSON
(`{"images": [...]}`), COCO's captions JSON (`{"images": [...], "annotations": [...]}`), and tar shards in img2dataset's
layout (`KEY.jpg` with `KEY.txt` or `KEY.json`).
"""

import glob
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mamo.config.values import Values
from mamo.data.captions import CAPTION, CaptionKeys
from mamo.data.errors import ErrorCollector, json_rows
from mamo.data.files import JsonError, brief, parse_json, read_text
from mamo.data.formats import METADATA, name_folder
from mamo.data.pair_lines import LinePairs, is_json_lines
from mamo.data.pair_record import PairRecord
from mamo.data.pair_rows import RowReader, is_id
from mamo.data.remote import remote_url
from mamo.data.shards import has_shards, read_shards
from mamo.data.tables import read_table, separator_of

MAX_CAPTION_CHARS = 100_000  # no text encoder reads as much; bounds the tokenizer's work on a text of megabytes
_START_CHARS = 4096


def clean_caption(text: str) -> str:
    """Normalise a text (NFKC) and collapse spaces; lone surrogates become '?'.

    A text over `MAX_CAPTION_CHARS` is cut, after a word where it has spaces.

    A text without a visible character returns "": it has only spaces, control or zero-width characters, or combining
    marks, from which the tokenizer makes no meaningful token.
    """
    text = text[: 4 * MAX_CAPTION_CHARS].encode("utf-8", "replace").decode("utf-8")
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if len(text) > MAX_CAPTION_CHARS:
        text = text[: text.rfind(" ", 0, MAX_CAPTION_CHARS + 1)] if " " in text[:MAX_CAPTION_CHARS] else text
        text = text[:MAX_CAPTION_CHARS]
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


def read_pairs(
    path: Path, split: str | None = None, caption_keys: CaptionKeys | None = None, columns: Sequence[str] = ()
) -> Sequence[PairRecord]:
    """Read the image-caption pairs of a file, an image folder, a folder of tar shards, or a glob of shards.

    The layout is detected from the content. Pairs in shards are read on access, see `shards.TarShardDataset`.

    Args:
        path: a file, a folder or a glob.
        split: split of a Karpathy file, required there and not allowed elsewhere; "train" includes "restval".
        caption_keys: field -> weight of its captions; `caption` alone by default. A row needs one of them.
        columns: names of the columns of a CSV or TSV without a header; other files do not need them.

    Raises:
        ValueError: bad rows (the first ten and the number of others, each with file, line, field and fix), no pairs,
            a caption key that no row has, or a `split` that does not apply.
    """
    keys = caption_keys or {CAPTION: 1.0}
    is_remote = remote_url(path) is not None and path.suffix not in (".json", ".jsonl", ".csv", ".tsv")
    is_shards = is_remote or path.is_dir() or path.suffix == ".tar" or (glob.has_magic(str(path)) and not path.exists())
    if is_shards and path.is_dir() and not has_shards(path):
        found = [path / name for name in METADATA if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no tar shard (*.tar) found; it is {name_folder(path)}")
        path, is_shards = found[0], False
    if is_shards and split is not None:
        raise ValueError(_split_unused(path, split))
    records: Sequence[PairRecord] = read_shards(path, keys) if is_shards else _read_file(path, split, keys, columns)
    if not records:
        raise ValueError(f"{path}: contains no image-caption pairs")
    return records


def _read_file(path: Path, split: str | None, keys: CaptionKeys, columns: Sequence[str]) -> Sequence[PairRecord]:
    if split is None and is_json_lines(path):
        return LinePairs(path, keys)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; write one JSON object a line")
    separator = separator_of(path, text, len(columns))
    if separator and split is None:
        rows: list[tuple[int, Any]] = list(read_table(path, text, separator, columns))
        return _read_rows(path, [(line, _from_table(row)) for line, row in rows], keys)
    document = _whole_document(path, text)
    if isinstance(document, dict) and "annotations" not in document:
        return _read_karpathy(path, document, split)
    if split is not None:
        raise ValueError(_split_unused(path, split))
    if isinstance(document, dict):
        return _read_coco(path, document)
    if isinstance(document, list):
        return _read_rows(path, list(enumerate(document, 1)), keys)
    return _read_lines(path, text, keys)


def _from_table(row: Mapping[str, str]) -> Values:
    """Return a row of a table as one of JSON Lines; empty optional fields are left out."""
    optional = ("image_id", "directory", "foils", "caption_id")
    return {name: value for name, value in row.items() if value or name not in optional}


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


def _read_lines(path: Path, text: str, keys: CaptionKeys) -> list[PairRecord]:
    errors = ErrorCollector(path)
    return _read_rows(path, list(json_rows(text.split("\n"), errors)), keys, errors)


def _read_rows(
    path: Path, rows: Iterable[tuple[int, Any]], keys: CaptionKeys, errors: ErrorCollector | None = None
) -> list[PairRecord]:
    reader = RowReader(path, keys, errors)
    records = [record for line, value in rows if (record := reader.read(line, value)) is not None]
    reader.finish(len(records))
    return records


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
            rows.append((number, {**row, "caption_id": ids} if ids and all(map(is_id, ids)) else row))
    return _read_rows(path, rows, {CAPTION: 1.0}, errors)


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
        if not (isinstance(image, dict) and is_id(image.get("id")) and _is_text(image.get("file_name"))):
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
            rows.append((number, {**row, "caption_id": ids} if all(map(is_id, ids)) else row))
    unknown = [key for key in captions if key not in names]
    if unknown:
        errors.add(1, f"'annotations': image_id {brief(unknown[0])} is not in 'images'")
    return _read_rows(path, rows, {CAPTION: 1.0}, errors)


def _coco_captions(annotations: Any, errors: ErrorCollector) -> dict[object, list[tuple[str, object]]]:
    """Return the captions of COCO's annotations, with their ids, by image id; bad entries are added to `errors`."""
    captions: dict[object, list[tuple[str, object]]] = {}
    for number, entry in enumerate(annotations if isinstance(annotations, list) else [annotations], 1):
        if isinstance(entry, dict) and _is_text(entry.get("caption")) and is_id(entry.get("image_id")):
            captions.setdefault(entry["image_id"], []).append((entry["caption"], entry.get("id")))
        else:
            errors.add(number, "an entry of 'annotations' needs 'image_id' and 'caption'; is it a captions file?")
    return captions
