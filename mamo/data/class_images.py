"""Images with class labels: folders of classes, or CSV files; and the images of a folder.

photos/cat/1.jpg, photos/dog/2.jpg           the label is the name of the folder below the one that is named
image,label                                  CSV, UTF-8, with this header; paths are relative to the file
photos/1.jpg,cat
"""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from mamo.data.files import brief, read_text

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"}
_COLUMNS = ("image", "label")
MOST_CHARS = 100_000
"""Of a field of a CSV file."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images of `source` with their labels, in the order of the file or of the paths."""

    source: Path
    images: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))


def list_images(folder: Path) -> list[str]:
    """Return the paths of all images below a folder, sorted; hidden files and folders are skipped.

    Raises:
        ValueError: there is none.
    """
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(root, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES
        ]
    if not found:
        raise ValueError(f"{folder}: contains no image; known suffixes: {', '.join(sorted(_SUFFIXES))}")
    return sorted(found)


def read_labelled_images(source: Path) -> LabelledImages:
    """Read a folder of class folders, or a CSV file.

    Raises:
        ValueError: no images, an image outside of the class folders, or a row of another form (with file and line).
    """
    return _read_folder(source) if source.is_dir() else _read_csv(source)


def _read_folder(folder: Path) -> LabelledImages:
    images = list_images(folder)
    parts = [Path(image).relative_to(folder).parts for image in images]
    loose = [part[0] for part in parts if len(part) == 1]
    if loose:
        raise ValueError(f"{folder}: {loose[0]} is in no class folder; write {folder}/CLASS/{loose[0]}, or a CSV file")
    return LabelledImages(folder, tuple(images), tuple(part[0] for part in parts))


def _read_csv(file: Path) -> LabelledImages:
    text = read_text(file, "; give a folder of class folders, or a CSV file")
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    images, labels = [], []
    try:
        head = [name.strip() for name in next(reader, [])]
        if sorted(head) != sorted(_COLUMNS):
            raise ValueError(f"{file}:1: must be the header image,label, got {brief(','.join(head))}")
        for row in reader:
            if any(len(cell) > MOST_CHARS for cell in row):  # the reader's own limit is that of the whole process
                raise ValueError(
                    f"{file}:{reader.line_num}: not a row of CSV: a field has over {MOST_CHARS} characters"
                )
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != 2 or not all(cell.strip() for cell in row):
                raise ValueError(f"{file}:{reader.line_num}: needs an image and a label, got {brief(','.join(row))}")
            values = dict(zip(head, (cell.strip() for cell in row), strict=True))
            images.append(str(file.parent.absolute() / values["image"]))
            labels.append(values["label"])
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: not a row of CSV: {error}") from None
    if not images:
        raise ValueError(f"{file}: contains no images")
    return LabelledImages(file, tuple(images), tuple(labels))
