"""Builder of emoji: pictures of three designers with the names and tags of Unicode's CLDR, from four npm packages.

`npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 openmoji@15.1.0 emojibase-data@17.0.0`
fetches them. The third designer's pictures are SVG, which `pip install mamo[emoji]` draws.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, entries_of
from mamo.data.files import read_json
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import write_json_lines

_NAMES = "emojibase-data/en/data.json"
_PICTURES = {
    "google": ("emoji-datasource-google/img/google/64", ".png"),
    "twitter": ("emoji-datasource-twitter/img/twitter/64", ".png"),
    "openmoji": ("openmoji/color/svg", ".svg"),
}
"""Designer -> folder of pictures in `node_modules`, and their ending."""
_EXPECTED = {"train": 4960, "test": 395, "test-new-style": 394}
_COMPONENTS = 2
"""CLDR's group of skin tones and hair, which are parts of emoji."""
_TONES = (1, 3, 5)
"""Light, medium and dark skin, of five."""
_TEST_PERCENT = 15
_TAGS = 4
_SIDE_PX = 72


@dataclass(frozen=True, slots=True)
class _Emoji:
    """One emoji: its code points in hexadecimal without variation selectors, its name, and tags drawn from its base."""

    code: str
    name: str
    tags: tuple[str, ...]
    is_test: bool


def build_emoji(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl`, `test.jsonl` and, where OpenMoji is installed, `test-new-style.jsonl`.

    `train.jsonl` has the pictures of two designers with two captions each, the name, and the name with up to four tags.
    The test files have base emoji that no training picture shows, in any skin tone, with their names: one in a style of
    the training, one by a third designer. An emoji is in the test files by a hash of its code; all skin tones go
    together.

    Args:
        source: `node_modules`, with the packages that the module names. Pictures of the two designers stay there.
        to: folder to write; drawings of the third designer go to `img/openmoji`.
        overwrite: whether existing files may be replaced.

    Raises:
        ValueError: a package is missing or has another layout, nothing can draw SVG, or an output file exists.
    """
    if not (source / _NAMES).is_file():
        raise ValueError(f"{source}: contains no {_NAMES}; install the packages with npm and name node_modules")
    pictures = {designer: _by_code(source / folder, ending) for designer, (folder, ending) in _PICTURES.items()}
    for designer in ("google", "twitter"):
        if not pictures[designer]:
            raise ValueError(
                f"{source}: contains no pictures in {_PICTURES[designer][0]}; install that package with npm"
            )
    every = [emoji for emoji in _read(source / _NAMES) if all(emoji.code in pictures[d] for d in ("google", "twitter"))]
    images, files = ReleaseImages(source, to), dict[str, list[dict[str, Any]]]()
    files["train"] = [
        _row(emoji, designer, images.relative_path(pictures[designer][emoji.code]), has_tags=True)
        for emoji in every
        if not emoji.is_test
        for designer in ("google", "twitter")
    ]
    held_out = [emoji for emoji in every if emoji.is_test]
    files["test"] = [_row(e, "google", images.relative_path(pictures["google"][e.code])) for e in held_out]
    with OutputFolder(to, overwrite) as output:
        if pictures["openmoji"]:
            drawn = [emoji for emoji in held_out if emoji.code in pictures["openmoji"]]
            for emoji in drawn:
                path = output.path(f"img/openmoji/{emoji.code}.png")
                path.write_bytes(_draw(source / pictures["openmoji"][emoji.code]))
            files["test-new-style"] = [_row(e, "openmoji", f"img/openmoji/{e.code}.png") for e in drawn]
        for name, rows in files.items():
            write_json_lines(output.path(f"{name}.jsonl"), rows)
    counts = (Count(f"{name} pictures", len(rows), _EXPECTED[name]) for name, rows in files.items())
    return BuildReport(tuple(counts), () if pictures["openmoji"] else ("openmoji",))


def _row(emoji: _Emoji, designer: str, image: str, has_tags: bool = False) -> dict[str, Any]:
    captions = [emoji.name, ", ".join([emoji.name, *emoji.tags])] if has_tags and emoji.tags else [emoji.name]
    return {"image": image, "caption": captions, "image_id": f"{designer}/{emoji.code}"}


def _code(name: str) -> str:
    """Return code points in small letters without the selector that asks for a coloured picture."""
    return name.lower().replace("-fe0f", "")


def _by_code(folder: Path, ending: str) -> Mapping[str, str]:
    """Return code -> path in `node_modules` of the pictures in a folder; nothing where it is missing."""
    root = "/".join(folder.parts[-4:]) if ending == ".png" else "/".join(folder.parts[-3:])
    return {_code(file.stem): f"{root}/{file.name}" for file in sorted(folder.glob(f"*{ending}"))}


def _read(file: Path) -> Iterator[_Emoji]:
    """Read the emoji in CLDR's order, each followed by its skin tones; components and letters are left out."""
    listed = [entry for entry in entries_of(read_json(file), "", file) if "group" in entry]
    for base in sorted(listed, key=lambda entry: entry.integer("order")):
        if base.integer("group") == _COMPONENTS:
            continue
        digest = hashlib.md5(base.words("hexcode").encode(), usedforsecurity=False).hexdigest()
        is_test = int(digest, 16) % 100 < _TEST_PERCENT
        yield _emoji(base, base, is_test)
        for skin in base.entries("skins") if "skins" in base else ():
            if skin.value.get("tone") in _TONES:
                yield _emoji(skin, base, is_test)


def _emoji(entry: Entry, base: Entry, is_test: bool) -> _Emoji:
    """Return an emoji with tags of its base, drawn by its code."""
    code, tags = _code(entry.words("hexcode")), base.value.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise base.error("tags", "must be a list of texts")
    drawn = list(tags)
    random.Random(code).shuffle(drawn)
    return _Emoji(code, entry.words("label"), tuple(drawn[:_TAGS]), is_test)


def _draw(file: Path) -> bytes:
    """Draw an SVG file as PNG on white. Raises ValueError where nothing can."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError(f"{file}: needs resvg to be drawn; install it with `pip install mamo[emoji]`") from None
    found: Any = resvg_py.svg_to_bytes(
        svg_path=str(file), width=_SIDE_PX, height=_SIDE_PX, background="#ffffff", skip_system_fonts=True
    )
    return bytes(found)
