"""Emoji from four npm packages: captions, split, designers, drawings."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mamo.data.builders.emoji import build_emoji
from mamo.data.images import decode_image
from mamo.data.items import read_items
from mamo.data.pairs_reader import read_pairs

# Tags of version 17.0.0; the captions below are those of a public copy of the data set.
GRINNING = ["cheerful", "cheery", "face", "grin", "grinning", "happy", "laugh", "nice", "smile", "smiling", "teeth"]
WAVING = [
    "bye",
    "cya",
    "g2g",
    "greetings",
    "gtg",
    "hand",
    "hello",
    "hey",
    "hi",
    "later",
    "outtie",
    "ttfn",
    "ttyl",
    "wave",
    "yo",
    "you",
]
HELD_OUT = {"leftwards hand": "1FAF2", "man mechanic": "1F468-200D-1F527", "woman mechanic": "1F469-200D-1F527"}
"""Emoji that the hash of their code puts into the test files."""
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" fill="#f00"/></svg>'


def entry(label: str, code: str, order: int, **more: Any) -> dict[str, Any]:
    return {"label": label, "hexcode": code, "order": order, "group": 1, "tags": ["tag"], **more}


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """Packages with five emoji, of which one is a component and one has no picture by the second designer."""
    root = tmp_path / "node_modules"
    tones = [entry(f"waving hand: {tone}", f"1F44B-1F3F{k}", 10 + k, tone=k) for k, tone in enumerate("abcde", 1)]
    names = [
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        entry("waving hand", "1F44B", 3, tags=WAVING, skins=tones),
        entry("grinning face", "1F600", 1, tags=GRINNING),
        entry("slightly smiling face", "1F642", 2, tags=["x"]),
        entry("keycap: 3", "0033-FE0F-20E3", 20),
        entry("only one designer", "1F636", 21),
        entry("light skin tone", "1F3FB", 22, group=2),
    ]
    (root / "emojibase-data/en").mkdir(parents=True)
    (root / "emojibase-data/en/data.json").write_text(json.dumps(names))
    codes = ["1f44b", *(f"1f44b-1f3f{k}" for k in range(1, 6)), "1f600", "1f642", "0033-fe0f-20e3", "1f3fb", "1f636"]
    for designer in ("google", "twitter"):
        folder = root / f"emoji-datasource-{designer}/img/{designer}/64"
        folder.mkdir(parents=True)
        for code in codes[: None if designer == "google" else -1]:
            Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(folder / f"{code}.png")
    (root / "openmoji/color/svg").mkdir(parents=True)
    (root / "openmoji/color/svg/1F642.svg").write_text(DRAWING)
    return root


def test_names_tags_and_split_are_those_of_the_public_copy(modules: Path, tmp_path: Path) -> None:
    """Bug: other tags in another order, a skin tone on the other side of the split, a component among the pictures."""
    report = build_emoji(modules, tmp_path / "out")
    train = read_pairs(tmp_path / "out/train.jsonl")
    assert [row.image_id for row in train][:6] == [
        "google/1f600", "twitter/1f600", "google/1f44b", "twitter/1f44b", "google/1f44b-1f3f1", "twitter/1f44b-1f3f1",
    ]  # fmt: skip
    assert [row.image_id for row in train][-2:] == ["google/0033-20e3", "twitter/0033-20e3"]
    assert len(train) == 2 * (1 + 1 + 3 + 1)  # tones 1, 3 and 5 of five
    assert train[0].captions == ("grinning face", "grinning face, happy, smile, grinning, nice")
    assert train[2].captions == ("waving hand", "waving hand, you, hi, later, yo")
    assert train[4].captions[0] == "waving hand: a"
    assert set(train[4].captions[1].split(", ")[1:]) <= set(WAVING)
    (test,) = read_pairs(tmp_path / "out/test.jsonl")
    assert (test.image_id, test.captions) == ("google/1f642", ("slightly smiling face",))
    assert decode_image(Path(str(test.image))).unique().tolist() == [255]  # on white
    assert report.lines()[:2] == ["train pictures: found 12, expected 4960", "test pictures: found 1, expected 395"]


def test_the_third_designers_drawings_become_pictures(modules: Path, tmp_path: Path) -> None:
    """Bug: a drawing on black, in another size, or left out without a word."""
    pytest.importorskip("resvg_py")
    build_emoji(modules, tmp_path / "out")
    (row,) = read_pairs(tmp_path / "out/test-new-style.jsonl")
    assert (row.image_id, row.captions) == ("openmoji/1f642", ("slightly smiling face",))
    pixels = decode_image(Path(str(row.image)))
    assert pixels.shape == (3, 72, 72)
    assert pixels[:, 36, 10].tolist() == [255, 0, 0]
    assert pixels[:, 36, 60].tolist() == [255, 255, 255]


def test_what_is_missing_is_named(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a package that is not installed ends in a traceback, or in an empty file."""
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(
        ValueError, match=r"1F642\.svg: needs resvg to be drawn; install it with `pip install mamo\[emoji\]`"
    ):
        build_emoji(modules, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (modules / "openmoji/color/svg/1F642.svg").unlink()
    assert build_emoji(modules, tmp_path / "out").lines()[-1] == "not found, so not built: openmoji"
    for file in (modules / "emoji-datasource-twitter/img/twitter/64").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="contains no pictures in emoji-datasource-twitter/img/twitter/64; install"):
        build_emoji(modules, tmp_path / "other")
    with pytest.raises(ValueError, match=r"contains no emojibase-data/en/data\.json; install the packages"):
        build_emoji(tmp_path / "out", tmp_path / "other")


def test_items_are_the_same_emoji_in_another_tone(modules: Path, tmp_path: Path) -> None:
    """Bug: an item of two emoji, of a tone that nothing shows, with the wrong name right, or genders averaged in."""
    pytest.importorskip("resvg_py")
    names = json.loads((modules / "emojibase-data/en/data.json").read_text())
    for number, (label, code) in enumerate(HELD_OUT.items(), 30):
        tones = [
            entry(f"{label}: {tone} skin tone", f"{code}-{skin}", 0, tone=k)
            for tone, skin, k in (("light", "1F3FB", 1), ("medium", "1F3FD", 3), ("dark", "1F3FF", 5))
        ]
        names.append(entry(label, code, number, skins=tones))
        for each in (code, *(tone["hexcode"] for tone in tones)):
            (modules / f"openmoji/color/svg/{each}.svg").write_text(DRAWING)
            for designer in ("google", "twitter"):
                folder = modules / f"emoji-datasource-{designer}/img/{designer}/64"
                Image.new("RGB", (8, 8)).save(folder / f"{each.lower()}.png")
    (modules / "emojibase-data/en/data.json").write_text(json.dumps(names))
    report = build_emoji(modules, tmp_path / "out")
    assert "test-items: found 36, expected 516" in report.lines()
    for test, designer in (("test", "google"), ("test-new-style", "openmoji")):
        items = read_items(tmp_path / f"out/{test}-items.jsonl").items
        assert len(items) == 3 * 6 * 2  # three emoji in three tones: ordered pairs, both directions
        assert {item.group for item in items} == {"tone-text", "tone-image"}
        assert all(Path(name).is_file() for item in items for name in item.images)
        caption = {
            Path(str(row.image)).resolve(): row.captions[0] for row in read_pairs(tmp_path / f"out/{test}.jsonl")
        }
        asked = set()
        for item in items:
            shown = [caption[Path(name).resolve()] for name in item.images]
            other = (item.texts if item.group == "tone-text" else shown)[1]
            assert item.right == [(0, 0)]
            assert shown[0] == item.texts[0] != other
            assert shown[0].split(":")[0] == other.split(":")[0]
            assert "skin tone" in shown[0]
            assert "skin tone" in other
            assert designer in item.images[0]
            asked.add((item.group, shown[0], other))
        assert len(asked) == len(items)
        genders = read_items(tmp_path / f"out/{test}-gender-items.jsonl").items
        assert {item.group for item in genders} == {"gender-text", "gender-image"}
        found = {tuple(item.texts) for item in genders if item.group == "gender-text"}
        tones = ("", ": light skin tone", ": medium skin tone", ": dark skin tone")
        pair = ("man mechanic", "woman mechanic")
        assert found == {(f"{a}{tone}", f"{b}{tone}") for tone in tones for a, b in (pair, pair[::-1])}
