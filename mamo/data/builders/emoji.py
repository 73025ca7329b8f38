"""Builder of emoji: pictures of three designers with the names and tags of Unicode's CLDR, from four npm packages.

`npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 openmoji@15.1.0 emojibase-data@17.0.0`
fetches them. The third designer's pictures are SVG, which `pip install mamo[emoji]` draws.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamo.data.builders.report import BuildReport, Count, Entry, ReleaseImages, entries_of
from mamo.data.files import read_json
from mamo.data.items import Item, as_row
from mamo.data.output import OutputFolder
from mamo.data.pairs_reader import write_json_lines

_NAMES = "emojibase-data/en/data.json"
_PICTURES = {
    "google": ("emoji-datasource-google/img/google/64", ".png"),
    "twitter": ("emoji-datasource-twitter/img/twitter/64", ".png"),
    "openmoji": ("openmoji/color/svg", ".svg"),
}
"""Designer -> folder of pictures in `node_modules`, and their ending."""
_EXPECTED = {"train": 4960, "test": 395, "test-new-style": 394, "test-items": 516, "test-new-style-items": 516}
_COMPONENTS = 2
"""CLDR's group of skin tones and hair, which are parts of emoji."""
_TONES = (1, 3, 5)
"""Light, medium and dark skin, of five."""
_OPPOSITE = {"man": "woman", "men": "women", "boy": "girl", "prince": "princess"}
"""Words by which the names of two emoji may differ in gender only."""
_TEST_PERCENT = 15
_TAGS = 4
_SIDE_PX = 72


@dataclass(frozen=True, slots=True)
class _Emoji:
    """One emoji: its code points in hexadecimal without variation selectors, its name, and tags drawn from its base.

    `base` is the code of its base, `tone` one of `_TONES`, or 0 without.
    """

    code: str
    name: str
    tags: tuple[str, ...]
    is_test: bool
    base: str
    tone: int


def build_emoji(source: Path, to: Path, overwrite: bool = False) -> BuildReport:
    """Write `train.jsonl`, `test.jsonl`, items of both kinds, and the same of `test-new-style` with OpenMoji installed.

    `train.jsonl` has the pictures of two designers with two captions each, the name, and the name with up to four tags.
    The test files have base emoji that no training picture shows, in any skin tone, with their names: one in a style of
    the training, one by a third designer. An emoji is in the test files by a hash of its code; all skin tones go
    together.

    `TEST-items.jsonl` has the emoji of a test file against themselves in another skin tone: an image with the right
    and a wrong name, and a name with the right and a wrong image. `TEST-gender-items.jsonl` has emoji whose names
    differ in gender, in the same tone; it is a file of its own, as it has few and is not averaged with the others.

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
    files |= _item_files("test", held_out, files["test"])
    with OutputFolder(to, overwrite) as output:
        if pictures["openmoji"]:
            drawn = [emoji for emoji in held_out if emoji.code in pictures["openmoji"]]
            for emoji in drawn:
                path = output.path(f"img/openmoji/{emoji.code}.png")
                path.write_bytes(_draw(source / pictures["openmoji"][emoji.code]))
            files["test-new-style"] = [_row(e, "openmoji", f"img/openmoji/{e.code}.png") for e in drawn]
            files |= _item_files("test-new-style", drawn, files["test-new-style"])
        for name, rows in files.items():
            write_json_lines(output.path(f"{name}.jsonl"), rows)
    counts = [
        Count(name if name.endswith("items") else f"{name} pictures", len(rows), _EXPECTED.get(name))
        for name, rows in files.items()
    ]
    return BuildReport(tuple(counts), () if pictures["openmoji"] else ("openmoji",))


def _item_files(
    test: str, every: Sequence[_Emoji], rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return the items of a test file, by the name of their file; `rows` are those of the emoji."""
    image = {emoji.code: str(row["image"]) for emoji, row in zip(every, rows, strict=True)}
    by_base = itertools.groupby((emoji for emoji in every if emoji.tone), key=lambda emoji: emoji.base)
    tones = [pair for _, same in by_base for pair in itertools.permutations(same, 2)]
    by_name = {emoji.name: emoji for emoji in every}
    genders = [(emoji, other) for emoji in every if (other := by_name.get(_of_other_gender(emoji.name))) is not None]
    pairs = {"items": ("tone", tones), "gender-items": ("gender", genders)}
    return {
        f"{test}-{name}": [as_row(item) for pair in chosen for item in _items(kind, *pair, image)]
        for name, (kind, chosen) in pairs.items()
    }


def _items(kind: str, emoji: _Emoji, other: _Emoji, image: Mapping[str, str]) -> Iterator[Item]:
    """Yield an image with its own and a wrong name, and a name with its own and a wrong image."""
    images, texts, name = [image[emoji.code], image[other.code]], [emoji.name, other.name], f"{emoji.code}/{other.code}"
    yield Item(images=images[:1], texts=texts, right=[(0, 0)], group=f"{kind}-text", id=f"{name}/text")
    yield Item(images=images, texts=texts[:1], right=[(0, 0)], group=f"{kind}-image", id=f"{name}/image")


def _of_other_gender(name: str) -> str:
    """Return a name with every word of a gender replaced by that of the other; empty without such a word."""
    words = {**_OPPOSITE, **{other: word for word, other in _OPPOSITE.items()}}
    parts = re.split(r"(\w+)", name)
    changed = [words.get(part, part) for part in parts]
    return "".join(changed) if changed != parts else ""


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
    tone = entry.integer("tone") if entry is not base else 0
    return _Emoji(code, entry.words("label"), tuple(drawn[:_TAGS]), is_test, _code(base.words("hexcode")), tone)


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
